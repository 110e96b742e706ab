//! The binary as a script sees it: exit codes, JSON keys, what stands on which stream, and interruptions.

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

const BIN: &str = env!("CARGO_BIN_EXE_codecllm");

fn codecllm<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    Command::new(BIN).args(args).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The one JSON object of a successful command.
fn json_of(output: &Output) -> Value {
    assert_eq!(code(output), 0, "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A checkpoint of `n_shards` files with a BF16 matrix and a norm each.
fn model(n_shards: usize, n_rows: usize, n_cols: usize) -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut weight_map = serde_json::Map::new();
    let mut state = 1u64;
    for i in 0..n_shards {
        let (matrix, norm) = (format!("model.layers.{i}.mlp.up_proj.weight"), format!("model.layers.{i}.norm.weight"));
        let n_matrix = 2 * n_rows * n_cols;
        let header = json!({
            "__metadata__": {"format": "pt"},
            matrix.as_str(): {"dtype": "BF16", "shape": [n_rows, n_cols], "data_offsets": [0, n_matrix]},
            norm.as_str(): {"dtype": "BF16", "shape": [n_cols], "data_offsets": [n_matrix, n_matrix + 2 * n_cols]},
        })
        .to_string();
        let mut bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        for _ in 0..n_rows * n_cols + n_cols {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let weight = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
            bytes.extend(half::bf16::from_f32(weight).to_le_bytes());
        }
        let file = format!("model-{:05}-of-{n_shards:05}.safetensors", i + 1);
        fs::write(dir.path().join(&file), bytes).unwrap();
        weight_map.extend([(matrix, json!(file)), (norm, json!(file))]);
    }
    let index = json!({"metadata": {}, "weight_map": weight_map}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn compress_verify_inspect() {
    let source = model(2, 64, 96);
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    let (src, dst) = (text(source.path()), text(&archive));

    let made = json_of(&codecllm(["compress", src, "-o", dst, "--format", "bf16", "--json", "--threads", "2"]));
    for key in
        ["output", "n_tensors", "n_encoded", "n_weights", "archive_bytes", "bits_per_weight", "ratio_bf16", "elapsed_s"]
    {
        assert!(!made[key].is_null(), "{key}");
    }

    let proof = json_of(&codecllm(["verify", dst, "--source", src, "--json"]));
    assert_eq!(proof["status"], "proven");
    for check in proof["checks"].as_array().unwrap() {
        assert!(check["name"].is_string() && check["status"] == "proven" && check["detail"].is_string());
    }

    let inspected = json_of(&codecllm(["inspect", dst, "--json"]));
    for tensor in inspected["tensors"].as_array().unwrap() {
        let keys =
            ["name", "shape", "format", "coder", "n_weights", "entropy_bits", "bits_per_weight", "relative_error"];
        for key in keys {
            assert!(tensor.get(key).is_some(), "{key}");
        }
    }
    for key in ["n_weights", "bytes", "bits_per_weight", "ratio_bf16"] {
        assert!(inspected["total"][key].is_number() && inspected["encoded"][key].is_number(), "{key}");
    }
    assert_eq!(inspected["total"]["bytes"], made["archive_bytes"]);

    for command in [&["inspect", dst][..], &["verify", dst], &["verify", dst, "--cpu", "scalar"]] {
        let output = codecllm(command);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert!(!output.stdout.is_empty());
    }
}

#[test]
fn exit_codes_tell_wrong_from_unusable() {
    let source = model(1, 32, 32);
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    let (src, dst) = (text(source.path()), text(&archive));
    assert_eq!(code(&codecllm(["compress", src, "-o", dst])), 0);

    let fails = |expected: i32, args: &[&str], words: &[&str]| {
        let output = codecllm(args);
        assert_eq!(code(&output), expected, "{args:?}: {}", stderr(&output));
        for word in words {
            assert!(stderr(&output).contains(word), "{args:?}: {}", stderr(&output));
        }
        output
    };
    fails(2, &[], &["Usage"]);
    fails(2, &["compress", src], &["--output"]);
    fails(2, &["compress", src, "-o", dst, "--format", "int9"], &["int8"]);
    fails(2, &["compress", src, "-o", dst, "--layers", "8..3"], &["A..B"]);
    fails(2, &["compress", src, "-o", dst], &["--force"]);
    fails(2, &["compress", src, "-o", src, "--force"], &["source"]);
    fails(2, &["compress", "./absent", "-o", dst], &["no such directory"]);
    fails(1, &["compress", dst, "-o", text(&target.path().join("b"))], &["archive already"]);
    fails(1, &["inspect", text(target.path())], &["looked for"]);
    fails(2, &["verify", dst, "--source", "./absent"], &["no such directory"]);
    fails(2, &["verify", dst, "--cpu", "sse9"], &["avx2"]);
    // No machine has so many GPUs.
    fails(2, &["verify", dst, "--device", "cuda:99"], &["CUDA"]);
    fails(2, &["run", src, "-p", "x", "--vram", "8"], &["--device cuda"]);
    fails(2, &["run", src, "-p", "x", "--device", "cuda", "--vram", "none"], &["--vram"]);
    fails(2, &["run", src, "-p", "x", "--device", "cuda", "--cache", "all"], &["lossless"]);

    let absent = fails(2, &["verify", text(&target.path().join("absent")), "--json"], &[]);
    assert_eq!(serde_json::from_slice::<Value>(&absent.stdout).unwrap()["status"], "unchecked");
    let shard = archive.join("model-00001-of-00001.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let wrong = fails(1, &["verify", dst, "--json"], &[]);
    assert_eq!(serde_json::from_slice::<Value>(&wrong.stdout).unwrap()["status"], "wrong");
    fails(1, &["inspect", dst], &["checksum"]);
}

#[test]
fn demo_run_eval_and_rate_on_the_embedded_model() {
    let dir = TempDir::new().unwrap();
    let keep = text(dir.path());
    let demo = json_of(&codecllm(["demo", "--keep", keep, "--json"]));
    assert_eq!(demo["is_restored"], true);
    let [checkpoint, bf16, ..] = demo["results"].as_array().unwrap().as_slice() else { panic!("{demo}") };
    assert_eq!((&bf16["text"], &bf16["greedy_identical"]), (&checkpoint["text"], &json!(10)));

    let source = format!("{keep}/tales-5m");
    let run = |model: &str| json_of(&codecllm(["run", model, "-p", "The fox said", "-n", "12", "--json"]));
    let told = run(&source);
    assert_eq!(told["text"], run(&format!("{source}.bf16"))["text"]);
    for key in ["n_prompt_tokens", "prompt_tok_per_s", "generate_tok_per_s", "peak_memory_bytes", "weight_bytes"] {
        assert!(told[key].as_f64().unwrap() > 0.0, "{key}: {told}");
    }
    assert_eq!(told["n_generated"], 12);

    let calibration = dir.path().join("text.txt");
    fs::write(&calibration, "The fox said to the king that he was hungry, and the king gave him bread. ".repeat(8))
        .unwrap();
    let rate = format!("{keep}/rate");
    let args = [
        "compress",
        &source,
        "-o",
        &rate,
        "--format",
        "rate",
        "--kld",
        "0.1",
        "--kld-text",
        text(&calibration),
        "--json",
    ];
    let compressed = json_of(&codecllm(args));
    assert!((2.0..6.0).contains(&compressed["bits_per_weight"].as_f64().unwrap()), "{compressed}");
    assert_eq!(json_of(&codecllm(["verify", &rate, "--source", &source, "--json"]))["status"], "proven");
    let eval = json_of(&codecllm(["eval", &rate, "--text", text(&calibration), "--baseline", &source, "--json"]));
    let kld = eval["kld_mean"].as_f64().unwrap();
    assert!((0.05..=0.1).contains(&kld), "{kld}");
    for key in ["n_tokens", "perplexity", "baseline_perplexity", "top1_equal", "greedy_identical", "greedy_prompts"] {
        assert!(eval[key].is_number(), "{key}: {eval}");
    }

    // At equal size, a calibrated archive is nearer to its source, on text that has no part in it.
    let divergence = |name: &str, calibrate: &[&str]| {
        let archive = format!("{keep}/{name}");
        let rate = ["compress", &source, "-o", &archive, "--format", "rate", "--bits", "4.5", "--json"];
        let compressed = json_of(&codecllm(rate.iter().chain(calibrate)));
        assert!((compressed["bits_per_weight"].as_f64().unwrap() / 4.5 - 1.0).abs() < 0.01, "{compressed}");
        assert_eq!(compressed["calibration"].is_null(), calibrate.is_empty(), "{compressed}");
        let proof = json_of(&codecllm(["verify", &archive, "--source", &source, "--json"]));
        assert_eq!(proof["status"], "proven");
        let eval = ["eval", &archive, "--text", text(&calibration), "--baseline", &source, "--greedy-tokens", "0"];
        let kld = json_of(&codecllm(eval.iter().chain(&["--json"])))["kld_mean"].as_f64().unwrap();
        (kld, compressed["calibration"].clone())
    };
    let (plain, _) = divergence("plain", &[]);
    let (calibrated, cost) = divergence("calibrated", &["--calibrate", "--samples", "8"]);
    assert!(calibrated < 0.95 * plain, "{calibrated} calibrated, {plain} not");
    assert_eq!((&cost["n_tokens"], &cost["is_own_text"]), (&json!(8 * 512), &json!(true)));
    assert!(cost["text_s"].as_f64().unwrap() > 0.0 && cost["encode_s"].as_f64().unwrap() > 0.0, "{cost}");

    // What cannot be done is refused before any text is written: here there could be none, without a tokenizer.
    let mute = format!("{keep}/mute");
    fs::create_dir(&mute).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(format!("{source}/{file}"), format!("{mute}/{file}")).unwrap();
    }
    for (target, dst, said) in [
        (["--bits", "40"], "x", "this model takes between"),
        (["--size", "10"], "x", "this model takes between"),
        (["--kld", "0"], "x", "is no target"),
        (["--bits", "4"], &rate, "it exists already"),
        (["--bits", "4"], "x", "tokenizer.json"),
    ] {
        let args = ["compress", &mute, "-o", dst, "--format", "rate", "--calibrate"];
        let refused = codecllm(args.iter().chain(&target));
        assert!(stderr(&refused).contains(said), "{target:?}: {}", stderr(&refused));
        assert_ne!(code(&refused), 0);
    }

    let short = text(&calibration);
    for (args, said) in [
        (vec!["--format", "rate"], "needs a target"),
        (vec!["--format", "rate", "--calibrate"], "needs a target"),
        (vec!["--format", "int8", "--bits", "4"], "takes no target"),
        (vec!["--format", "int8", "--calibrate"], "--format rate"),
        (vec!["--format", "int8", "--trellis"], "has no trellis"),
        (vec!["--format", "rate", "--bits", "4", "--coder", "zstd", "--trellis"], "has no trellis"),
        (vec!["--format", "rate", "--bits", "4", "--calibrate", short], "give one of 512 or more"),
    ] {
        let refused = codecllm([vec!["compress", &source, "-o", "x"], args].concat());
        assert_eq!(code(&refused), 2);
        assert!(stderr(&refused).contains(said), "{}", stderr(&refused));
    }
}

#[test]
fn every_command_teaches() {
    for command in ["compress", "verify", "inspect", "compare", "sweep"] {
        let help = codecllm([command, "--help"]);
        assert_eq!(code(&help), 0);
        assert!(
            String::from_utf8(help.stdout).unwrap().contains(&format!("codecllm {command} ")),
            "{command}: an example"
        );
    }
}

#[test]
fn an_unreachable_hub_names_the_local_way() {
    let target = TempDir::new().unwrap();
    let output = Command::new(BIN)
        .args(["compress", "nobody/nothing", "-o", text(&target.path().join("a"))])
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env("HF_HOME", target.path())
        .output()
        .unwrap();
    assert_eq!(code(&output), 1);
    for words in ["cannot be reached", "Pass a directory", "hf download nobody/nothing"] {
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn the_hubs_cache_serves_when_the_network_does_not() {
    let home = TempDir::new().unwrap();
    let repository = home.path().join("hub/models--some--model");
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::create_dir_all(repository.join("snapshots/abc")).unwrap();
    fs::write(repository.join("refs/main"), "abc").unwrap();
    let source = model(1, 32, 32);
    for entry in fs::read_dir(source.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), repository.join("snapshots/abc").join(entry.file_name())).unwrap();
    }
    let output = Command::new(BIN)
        .args(["compress", "some/model", "-o", text(&home.path().join("a"))])
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env("HF_HOME", home.path())
        .output()
        .unwrap();
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).contains("using the cached"));
}

#[cfg(unix)]
mod unix {
    use super::*;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    #[test]
    fn a_failing_write_is_an_error_that_leaves_no_archive() {
        let source = model(1, 512, 512);
        let target = TempDir::new().unwrap();
        let archive = target.path().join("a");
        let limited = "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\"";
        let output = Command::new("sh")
            .args(["-c", limited, BIN, "compress", text(source.path()), "-o", text(&archive)])
            .output()
            .unwrap();
        assert_eq!(code(&output), 1, "{}", stderr(&output));
        assert!(stderr(&output).contains("a.partial/model-00001-of-00001.safetensors"), "{}", stderr(&output));
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    }

    #[test]
    fn ctrl_c_ends_with_130_and_resume_completes() {
        let source = model(24, 1024, 1024);
        let target = TempDir::new().unwrap();
        let archive = target.path().join("a");
        let args = ["compress", text(source.path()), "-o", text(&archive), "--threads", "1"];
        let child = Command::new(BIN).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // By the time that the second shard grows, the first is finished.
        let second = target.path().join("a.partial/model-00002-of-00024.safetensors.unfinished");
        let start = Instant::now();
        while !second.exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "the second shard never begins");
            std::thread::sleep(Duration::from_millis(1));
        }
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(code(&output), 130, "{}", stderr(&output));
        assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
        assert!(!archive.exists());

        let resumed = json_of(&codecllm(args.iter().chain(&["--resume", "--json"])));
        assert!(resumed["n_resumed_shards"].as_u64().unwrap() > 0);
        assert_eq!(code(&codecllm(["verify", text(&archive), "--source", text(source.path())])), 0);
    }
}
