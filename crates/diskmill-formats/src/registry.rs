//! Every format this program can open, in one list.

use diskmill_core::Driver;

use crate::{cow, luks, qcow, qcow2, raw, vdi, vmdk};

static DRIVERS: [&dyn Driver; 7] = [
    &raw::DRIVER,
    &qcow2::DRIVER,
    &qcow::DRIVER,
    &vmdk::DRIVER,
    &vdi::DRIVER,
    &cow::DRIVER,
    &luks::DRIVER,
];

/// The drivers of all formats.
pub fn drivers() -> &'static [&'static dyn Driver] {
    &DRIVERS
}

/// The driver of the format that `qemu-img` calls `name`.
pub fn by_name(name: &str) -> Option<&'static dyn Driver> {
    drivers()
        .iter()
        .find(|driver| driver.format().name() == name)
        .copied()
}
