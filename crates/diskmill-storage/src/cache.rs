//! How writes pass the host's cache.

/// What `-t` and `-T` mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheMode {
    /// Past the host's page cache (`O_DIRECT`); durable after a flush.
    None,
    /// Through the page cache; durable after a flush.
    #[default]
    Writeback,
    /// Through the page cache; every write is durable before it returns.
    Writethrough,
    /// Past the page cache, and every write is durable before it returns.
    Directsync,
    /// Through the page cache; flushes are not passed on.
    Unsafe,
}

impl CacheMode {
    /// The mode of this name, as `qemu-img -t` takes it; `off` is another word for `none`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "none" | "off" => Self::None,
            "writeback" => Self::Writeback,
            "writethrough" => Self::Writethrough,
            "directsync" => Self::Directsync,
            "unsafe" => Self::Unsafe,
            _ => return None,
        })
    }

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Whether the page cache is passed by.
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether every write is durable before it returns.
    pub const fn is_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for mode in [
            CacheMode::None,
            CacheMode::Writeback,
            CacheMode::Writethrough,
            CacheMode::Directsync,
            CacheMode::Unsafe,
        ] {
            assert_eq!(CacheMode::parse(mode.name()), Some(mode));
        }
        assert_eq!(CacheMode::parse("off"), Some(CacheMode::None));
        assert_eq!(CacheMode::parse("None"), None);
    }
}
