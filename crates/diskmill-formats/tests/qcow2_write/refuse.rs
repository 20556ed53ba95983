//! What must not be written is refused by name, and nothing is lost.
