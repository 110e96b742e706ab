//! The fuzzers' corpus, and what they once found, stays fixed.

#[path = "common/fuzz.rs"]
mod fuzz;

use std::path::Path;

fn replay(target: &str, run: impl Fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut n = 0;
    for file in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        run(&std::fs::read(file.unwrap().path()).unwrap());
        n += 1;
    }
    assert!(n > 0, "the corpus of {target} is empty");
}

#[test]
fn encoded_tensor() {
    replay("encoded_tensor", fuzz::encoded_tensor);
}

#[test]
fn round_trip() {
    replay("round_trip", fuzz::round_trip);
}

#[test]
fn archive() {
    replay("archive", fuzz::archive);
}

#[test]
fn gguf() {
    replay("gguf", fuzz::gguf);
}
