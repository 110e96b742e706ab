//! codecllm
fn main() {}
