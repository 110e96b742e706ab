#![no_main]
#[path = "../../codec/tests/common/fuzz.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::gguf(data));
