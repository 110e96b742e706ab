//! The golden vectors decode to the listed codes on every decoder, and the others are refused for the listed reason.

use bytes::Bytes;
use codecllm_codec::{Checks, Cpu, EncodedTensor};
use serde_json::Value;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../vectors")
}

fn read(name: &str) -> Bytes {
    std::fs::read(vectors().join(name)).unwrap_or_else(|e| panic!("vectors/{name}: {e}")).into()
}

fn manifest() -> Value {
    serde_json::from_slice(&read("manifest.json")).unwrap()
}

fn hash(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

#[test]
fn golden_vectors_decode_on_every_decoder() {
    let manifest = manifest();
    let golden = manifest["golden"].as_array().unwrap();
    assert!(golden.len() >= 20);
    for entry in golden {
        let name = entry["file"].as_str().unwrap();
        let data = read(name);
        assert_eq!(entry["xxh3"], hash(&data), "{name} itself has changed");
        let encoded = EncodedTensor::parse(data, Checks::Full).unwrap();
        assert_eq!(entry["shape"], serde_json::json!([encoded.n_rows(), encoded.n_cols()]), "{name}");
        let scales: Vec<u8> = (0..encoded.n_rows()).flat_map(|r| encoded.scale(r).to_le_bytes()).collect();
        assert_eq!(entry["scales_f32_xxh3"], hash(&scales), "{name}: scales");
        for cpu in Cpu::available() {
            let codes = encoded.decode_codes(cpu).unwrap();
            let bytes: Vec<u8> = (0..codes.len()).flat_map(|i| codes.get(i).to_le_bytes()).collect();
            assert_eq!(entry["codes_u16_xxh3"], hash(&bytes), "{name} on {cpu}");
        }
    }
}

#[test]
fn bad_vectors_are_refused_for_their_reason() {
    let manifest = manifest();
    let bad = manifest["must_fail"].as_array().unwrap();
    assert!(bad.len() >= 30);
    for entry in bad {
        let (name, reason) = (entry["file"].as_str().unwrap(), entry["error"].as_str().unwrap());
        let error = EncodedTensor::parse(read(name), Checks::Full).expect_err(name).to_string();
        assert!(error.contains(reason), "{name}: {error}");
    }
}

#[test]
fn every_file_is_listed() {
    let manifest = manifest();
    let listed = |kind: &str| manifest[kind].as_array().unwrap().len();
    let n_files = std::fs::read_dir(vectors())
        .unwrap()
        .filter(|f| f.as_ref().unwrap().path().extension().is_some_and(|e| e == "bin"));
    assert_eq!(n_files.count(), listed("golden") + listed("must_fail"));
}
