//! What `--object` takes and refuses; the texts are those of qemu-img 10.0.2, which the tests of the command compare.

use super::*;
use crate::ui::Mode;

fn read(mode: Mode, given: &[&str]) -> Result<Secrets, Failure> {
    let given: Vec<String> = given.iter().map(|text| (*text).to_owned()).collect();
    secrets(
        &given,
        &Ui {
            mode,
            command: "info",
        },
    )
}

fn secret(given: &[&str]) -> Vec<u8> {
    let secrets = read(Mode::DropIn, given).unwrap();
    secrets.named("s").unwrap().as_bytes().to_vec()
}

#[test]
fn secrets_are_read_in_every_spelling() {
    for text in [
        "secret,id=s,data=p,,w",
        "qom-type=secret,data=p,,w,id=s,",
        "secret,id=s,data=no,data=p,,w",
        "secret,id=s,data=cCx3,format=base64",
        "secret,id=s,data=p,,w,iv=never looked at",
        r#"{"qom-type":"secret","id":"s","data":"p,w"}"#,
        "{'qom-type':'secret','id':'s','data':'cCx3','format':'base64'}",
    ] {
        assert_eq!(secret(&[text]), b"p,w", "{text}");
    }
    assert_eq!(secret(&["throttle-group,id=t", "secret,id=s,data="]), b"");
}

#[test]
fn what_is_no_text_is_refused_when_it_is_used_as_a_passphrase() {
    let given = ["secret,id=s,data=//79,format=base64"];
    let error = read(Mode::DropIn, &given).unwrap().named("s").unwrap_err();
    assert!(matches!(error.find(), Some(SecretError::NotText(_))));
    assert_eq!(
        read(Mode::Native, &given).unwrap().named("s").unwrap().as_bytes(),
        b"\xff\xfe\xfd"
    );
}

#[test]
fn no_failure_shows_a_secret() {
    for text in [
        "secret,id=s,data=a,hunter2",
        "secret,id=s,data=a,hunter2=b",
        "secret,id=s,data=a,hun ter2=b",
        "secret,id=s,data=!hunter2!,format=base64",
        "secret,id=s,data=hunter2,file=x",
        "secret,id=s,data=a,format=hunter2",
        "secret,id=s,data=hunter2,keyid=none",
        r#"{"qom-type":"secret","id":"s","data":["hunter2"]}"#,
        r#"{"qom-type":"secret","id":"s","data":"hunter2""#,
        r#"{"qom-type":"secret","id":"s","data":"hunter2","data.x":"y"}"#,
    ] {
        let failure = read(Mode::DropIn, &[text]).unwrap_err();
        assert!(!format!("{failure:?}").contains("ter2"), "{text}: {failure:?}");
    }
}
