use super::*;
use diskmill_core::{Driver, OpenSpec, Role};
use diskmill_storage::Memory;
use diskmill_testkit::contract;
use diskmill_testkit::model::{Model, Op};
use diskmill_testkit::sparse_random::mix;

fn open(bytes: Vec<u8>, options: &str) -> (Arc<Memory>, Arc<dyn LayerMut>) {
    let file = Arc::new(Memory::from(bytes));
    let mut how = OpenSpec::default();
    how.options.parse_more(options);
    how.unmap = true;
    let parsed = crate::raw::DRIVER.parse(Arc::clone(&file) as _, &how).unwrap();
    let layer = parsed
        .attach_mut(vec![(Role::Main, Arc::clone(&file) as _)], &how)
        .unwrap();
    (file, layer)
}

fn at(byte: u64) -> GuestOffset {
    GuestOffset::new(byte)
}

#[test]
fn a_window_keeps_writes_inside() {
    let (file, layer) = open(vec![1; 4096], "offset=1024,size=1024");
    let below = Chain::default();
    layer.write_at(at(0), &[2; 512], &below).unwrap();
    layer
        .zero(at(512)..at(1024), ZeroHow::KeepAllocated, &below)
        .unwrap();
    let error = layer.write_at(at(513), &[3; 512], &below).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert_eq!(
        layer.resize(2048, &below).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    let mut expected = vec![1; 4096];
    expected[1024..1536].fill(2);
    expected[1536..2048].fill(0);
    assert_eq!(file.to_vec().unwrap(), expected);
}

#[test]
fn the_disk_is_whole_sectors_and_the_file_as_long_as_asked() {
    let (file, layer) = open(vec![7; 1000], "");
    let below = Chain::default();
    assert_eq!(layer.virtual_size(), 1024);
    let mut tail = [9; 24];
    layer.read_at(at(1000), &mut tail).unwrap();
    assert_eq!(tail, [0; 24]);
    layer.resize(5000, &below).unwrap();
    assert_eq!((file.len().unwrap(), layer.virtual_size()), (5000, 5120));
    layer.resize(700, &below).unwrap();
    layer.resize(1500, &below).unwrap();
    let mut bytes = vec![9; 1536];
    layer.read_at(at(0), &mut bytes).unwrap();
    assert!(bytes[..700].iter().all(|byte| *byte == 7));
    assert!(bytes[700..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_raw_cannot_do_is_refused() {
    let (_, layer) = open(vec![0; 1024], "");
    let below = Chain::default();
    for error in [
        layer
            .write_encoded(at(0), Stored::Packed(&[1]), &below)
            .unwrap_err(),
        layer.clear().unwrap_err(),
        layer.resize(u64::MAX, &below).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    }
}

#[test]
fn random_operations_follow_the_model() {
    const SIZE: u64 = 256 << 10;
    let below = Chain::default();
    for seed in 0..20 {
        let (file, layer) = open(vec![5; SIZE as usize], "");
        let mut model = Model::new(vec![5; SIZE as usize]);
        for step in 0..60 {
            let random = |salt: u64| mix(seed << 32 | step << 8 | salt);
            let (at, len) = (random(0) % SIZE, random(1) % 20_000);
            let how = [ZeroHow::KeepAllocated, ZeroHow::MayUnmap][(random(2) % 2) as usize];
            let op = match random(3) % 8 {
                0 => Op::Zero { at, len, how },
                1 => Op::Discard { at, len },
                2 => Op::Resize {
                    size: at.next_multiple_of(512) + 512,
                },
                3 => Op::Packed { at, fill: 7 },
                4 => Op::Flush,
                _ => Op::Write {
                    at,
                    len,
                    fill: random(4) as u8,
                },
            };
            model
                .apply(&op, &layer, &below, 1, &|_| None)
                .unwrap_or_else(|error| panic!("seed {seed}, {op:?}: {error:?}"));
            model.assert_reads(&layer, &below);
        }
        contract::layer::all(&(Arc::clone(&layer) as Arc<dyn Layer>), &below, model.bytes());
        let mut stored = file.to_vec().unwrap();
        stored.resize(model.bytes().len(), 0);
        assert!(stored == model.bytes());
    }
}
