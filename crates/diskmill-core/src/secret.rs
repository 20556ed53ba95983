//! Passphrases and the like: what they are, and where a format finds the one it needs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::{Error, ErrorKind, Result};

/// Bytes that nobody else may see: wiped from memory when dropped, and shown by nothing.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// A secret of these bytes. They are not copied, so no second copy stays behind.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Asks somebody for a passphrase.
pub trait Ask: Send + Sync + fmt::Debug {
    /// The passphrase of `image`; `None` if there is nobody to ask. Asked again for the same image it may remember.
    fn ask(&self, image: &str) -> Result<Option<Secret>>;
}

/// What is wrong with a reference to a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// No such secret.
    #[error("no secret with id '{0}'")]
    Unknown(String),
    /// A second one of the same name.
    #[error("there is already a secret with id '{0}'")]
    Duplicate(String),
    /// An encrypted image, and nothing says what its key is. What comes with it is the option that would.
    #[error("the image is encrypted and nothing says what its key is ({0} would)")]
    Missing(&'static str),
    /// It is no text, and only text is taken for a passphrase, as `qemu-img` does.
    #[error("the secret '{0}' is not valid UTF-8")]
    NotText(String),
}

impl From<SecretError> for Error {
    fn from(error: SecretError) -> Self {
        Error::new(ErrorKind::Usage, error)
    }
}

/// The secrets an operation may use: some by id, and one for images that name none.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    named: BTreeMap<String, Result<Secret, SecretError>>,
    passphrase: Option<Secret>,
    ask: Option<Arc<dyn Ask>>,
    image: String,
}

impl Secrets {
    /// None at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one that options can name. An error with a [`SecretError`] if the id is taken.
    pub fn add(&mut self, id: impl Into<String>, secret: Secret) -> Result<()> {
        let id = id.into();
        if self.named.contains_key(&id) {
            return Err(SecretError::Duplicate(id).into());
        }
        self.named.insert(id, Ok(secret));
        Ok(())
    }

    /// Adds one that cannot be used, which is an error only for whoever asks for it.
    pub fn add_unfit(&mut self, id: impl Into<String>, why: SecretError) -> Result<()> {
        let id = id.into();
        if self.named.contains_key(&id) {
            return Err(SecretError::Duplicate(id).into());
        }
        self.named.insert(id, Err(why));
        Ok(())
    }

    /// The same secrets without any for images that name none: nobody is asked.
    #[must_use]
    pub fn only_named(&self) -> Self {
        Self {
            passphrase: None,
            ask: None,
            ..self.clone()
        }
    }

    /// Takes `passphrase` for every image that names no secret.
    pub fn set_passphrase(&mut self, passphrase: Secret) {
        self.passphrase = Some(passphrase);
    }

    /// Asks for what is not there otherwise.
    pub fn set_ask(&mut self, ask: Arc<dyn Ask>) {
        self.ask = Some(ask);
    }

    /// The same secrets, for the image that people know as `image`.
    #[must_use]
    pub fn for_image(&self, image: impl Into<String>) -> Self {
        Self {
            image: image.into(),
            ..self.clone()
        }
    }

    /// The secret called `id`. An error with a [`SecretError`] if there is none.
    pub fn named(&self, id: &str) -> Result<&Secret> {
        match self.named.get(id) {
            Some(Ok(secret)) => Ok(secret),
            Some(Err(why)) => Err(why.clone().into()),
            None => Err(SecretError::Unknown(id.to_owned()).into()),
        }
    }

    /// Whether there is a secret for an image that names `id`, or names none, or somebody to ask for it. Nobody is
    /// asked.
    pub fn offer(&self, id: Option<&str>) -> bool {
        match id {
            Some(_) => true,
            None => self.passphrase.is_some() || self.ask.is_some(),
        }
    }

    /// The secret for an image that names `id`, or names none: then the passphrase for all such images, or what
    /// somebody says who is asked. `None` if there is nobody to ask.
    pub fn find(&self, id: Option<&str>) -> Result<Option<Secret>> {
        match (id, &self.passphrase, &self.ask) {
            (Some(id), _, _) => self.named(id).cloned().map(Some),
            (None, Some(passphrase), _) => Ok(Some(passphrase.clone())),
            (None, None, Some(ask)) => ask.ask(&self.image),
            (None, None, None) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Parrot;

    impl Ask for Parrot {
        fn ask(&self, image: &str) -> Result<Option<Secret>> {
            Ok(Some(Secret::new(image.as_bytes().to_vec())))
        }
    }

    #[test]
    fn a_named_one_comes_before_the_passphrase_and_that_before_asking() {
        let mut secrets = Secrets::new();
        assert!(secrets.find(None).unwrap().is_none());
        secrets.set_ask(Arc::new(Parrot));
        let secrets_of_one = secrets.for_image("disk");
        assert_eq!(secrets_of_one.find(None).unwrap().unwrap().as_bytes(), b"disk");
        secrets.set_passphrase(Secret::new(b"all".to_vec()));
        assert_eq!(secrets.find(None).unwrap().unwrap().as_bytes(), b"all");
        secrets.add("s", Secret::new(b"one".to_vec())).unwrap();
        assert_eq!(secrets.find(Some("s")).unwrap().unwrap().as_bytes(), b"one");
        let missing = secrets.find(Some("t")).unwrap_err();
        assert!(missing.find::<SecretError>().is_some());
        assert!(secrets.add("s", Secret::new(Vec::new())).is_err());
        assert!(secrets.add_unfit("s", SecretError::NotText("s".into())).is_err());
        assert!(secrets.offer(None) && !secrets.only_named().offer(None));
        assert!(secrets.only_named().find(None).unwrap().is_none());
    }

    #[test]
    fn one_that_cannot_be_used_says_so_when_it_is_asked_for() {
        let mut secrets = Secrets::new();
        secrets.add_unfit("s", SecretError::NotText("s".into())).unwrap();
        let unfit = secrets.find(Some("s")).unwrap_err();
        assert!(matches!(unfit.find(), Some(SecretError::NotText(id)) if id == "s"));
    }

    #[test]
    fn nothing_shows_them() {
        let mut secrets = Secrets::new();
        secrets.add("s", Secret::new(b"hunter2".to_vec())).unwrap();
        assert!(!format!("{secrets:?}").contains("hunter2"));
    }
}
