//! `compare` and `sweep`, and a GGUF file wherever a checkpoint is taken, on the embedded model.

#[path = "../../codec/tests/common/gguf.rs"]
mod gguf;

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;
use tempfile::TempDir;

const BIN: &str = env!("CARGO_BIN_EXE_codecllm");

/// tales-5m as a BF16 GGUF file.
static MODEL: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tales-5m");
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(source.join(name)).unwrap()).unwrap() };
    let mut file = gguf::from_model(&json("config.json"), &gguf::tensors(&source));
    gguf::add_tokenizer(&mut file, &json("tokenizer.json"), "gpt-2");
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("tales.gguf");
    fs::write(&path, file.to_bytes()).unwrap();
    (dir, path)
});

fn model() -> &'static str {
    MODEL.1.to_str().unwrap()
}

fn codecllm(args: &[&str]) -> Output {
    Command::new(BIN).args(args).output().unwrap()
}

fn json_of(args: &[&str]) -> Value {
    let output = codecllm(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The report's text, having checked that it needs nothing else and that its data are those on standard output.
fn report(path: &Path, expected: &Value) -> String {
    let html = fs::read_to_string(path).unwrap();
    for outside in ["http://", "https://", "src=", "<link", "@import", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(html.contains("prefers-color-scheme:dark") && html.contains("role=\"img\"") && !html.contains("NaN"));
    let data = html.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    assert_eq!(&serde_json::from_str::<Value>(data).unwrap(), expected);
    html
}

#[test]
fn a_gguf_file_is_compressed_proven_and_run() {
    let dir = TempDir::new().unwrap();
    let archive = dir.path().join("a");
    let archive = archive.to_str().unwrap();
    json_of(&["compress", model(), "-o", archive, "--format", "bf16", "--json"]);
    assert_eq!(json_of(&["verify", archive, "--source", model(), "--json"])["status"], "proven");
    let tell = |model: &str| json_of(&["run", model, "-p", "The fox said", "-n", "12", "--json"])["text"].clone();
    assert_eq!(tell(archive), tell(model()));
}

#[test]
fn compare_puts_partial_and_whole_forms_in_one_table() {
    let dir = TempDir::new().unwrap();
    let html = dir.path().join("r.html");
    let outcome = json_of(&[
        "compare",
        model(),
        "--formats",
        "bf16,rate:2",
        "--layers",
        "2,all",
        "--tokens",
        "200",
        "--greedy-tokens",
        "8",
        "-p",
        "Once upon a time",
        "-p",
        "The king <b>",
        "-o",
        html.to_str().unwrap(),
        "--json",
    ]);
    let forms = outcome["forms"].as_array().unwrap();
    let names: Vec<_> = forms.iter().map(|f| (f["format"].as_str().unwrap(), f["layers"].as_str().unwrap())).collect();
    assert_eq!(names, [("bf16", "2"), ("rate:2", "2"), ("bf16", "all"), ("rate:2", "all")]);
    for form in forms {
        assert_eq!((&form["proof"], form["texts"].as_array().unwrap().len()), (&json!("proven"), 2), "{form}");
        for key in ["bits_per_weight", "ratio_bf16", "weight_bytes", "load_s", "generate_tok_per_s"] {
            assert!(form[key].as_f64().unwrap() > 0.0, "{key}: {form}");
        }
    }
    let verdicts: Vec<_> = forms.iter().map(|f| f["verdict"].as_str().unwrap()).collect();
    assert_eq!([verdicts[0], verdicts[2], verdicts[3]], ["identical", "identical", "broken"]);
    assert_eq!((&forms[1]["n_encoded"], &forms[2]["n_encoded"]), (&json!(2), &json!(43)));
    let kld = |i: usize| forms[i]["quality"]["kld_mean"].as_f64().unwrap();
    assert!(kld(2).abs() < 1e-9 && kld(1) > 1e-6 && kld(3) > 3.0 * kld(1), "{} {} {}", kld(1), kld(2), kld(3));
    // Two bits for the matrices that are compressed, be they two or all.
    for (form, key) in [(1, "encoded_bits_per_weight"), (3, "bits_per_weight")] {
        let bits = forms[form][key].as_f64().unwrap();
        assert!((bits - 2.0).abs() < 0.06, "{key} {bits}");
    }
    let html = report(&html, &outcome);
    assert!(html.contains("<td class=\"broken\">") && html.contains("<mark>") && html.contains("The king &lt;b&gt;"));
}

#[test]
fn compare_quantizers_shows_where_errors_fall() {
    let dir = TempDir::new().unwrap();
    let html = dir.path().join("q.html");
    let outcome = json_of(&[
        "compare",
        model(),
        "--quantizers",
        "tensor,channel,fp8,rate,rate:4.5:trellis",
        "-o",
        html.to_str().unwrap(),
        "--json",
    ]);
    let quantizers = outcome["quantizers"].as_array().unwrap();
    let names: Vec<_> = quantizers.iter().map(|q| q["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["int8:tensor", "int8", "fp8", "rate:4.5", "rate:4.5:trellis"]);
    let error = |q: usize| quantizers[q]["relative_error"].as_f64().unwrap();
    assert!(error(4) < 0.95 * error(3), "{} {}", error(4), error(3));
    let decile = |q: usize, i: usize| quantizers[q]["relative_error_by_decile"][i].as_f64().unwrap();
    assert!(decile(0, 0) > 1.2 * decile(0, 9), "one scale for a tensor hurts its small channels most");
    assert!(decile(1, 0) < 1.2 * decile(1, 9));
    for q in quantizers {
        let (entropy, bits) = (q["entropy_bits"].as_f64().unwrap(), q["bits_per_weight"].as_f64().unwrap());
        assert!(entropy < bits && bits < entropy + 0.6, "{entropy} {bits}");
        assert!(q["codes_median"].as_u64().unwrap() <= 256 && q["matrices"].as_array().unwrap().len() == 43);
    }
    report(&html, &outcome);
}

#[test]
fn sweep_draws_a_falling_curve_among_the_references() {
    let dir = TempDir::new().unwrap();
    let html = dir.path().join("s.html");
    let outcome = json_of(&[
        "sweep",
        model(),
        "--bits",
        "3..5",
        "--step",
        "1",
        "--formats",
        "int8,rate:4:trellis",
        "--references",
        "q8_0,q4_k,int4-128",
        "--gguf",
        model(),
        "--tokens",
        "200",
        "-o",
        html.to_str().unwrap(),
        "--json",
    ]);
    let number = |form: &Value, key: &str| form[key].as_f64().unwrap_or_else(|| panic!("{key}: {form}"));
    let curve: Vec<(f64, f64)> = outcome["curve"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (number(m, "model_bits_per_weight"), number(m, "kld_mean")))
        .collect();
    assert_eq!(curve.len(), 3);
    for ((bits, kld), expected) in curve.iter().zip([3.0, 4.0, 5.0]) {
        assert!((bits - expected).abs() < 0.01 * expected && *kld > 0.0, "{bits} {expected}");
    }
    assert!(curve.windows(2).all(|pair| pair[1].1 < pair[0].1), "{curve:?}");
    let others = outcome["others"].as_array().unwrap();
    let names: Vec<_> = others.iter().map(|o| o["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["int8", "rate:4:trellis", "Q8_0", "Q4_K", "INT4, groups of 128", "tales.gguf"]);
    let kld = |i: usize| number(&others[i], "kld_mean");
    assert!(kld(1) < 0.95 * curve[1].1, "{} {}", kld(1), curve[1].1);
    assert!(kld(2) < kld(3) && kld(3) < kld(4), "{} {} {}", kld(2), kld(3), kld(4));
    assert!(kld(5).abs() < 1e-12 && number(&others[5], "bits_per_weight") == 16.0, "the very model");
    let equal = number(&others[3], "rate_bits_at_equal_kld");
    assert!((3.0..4.6).contains(&equal), "{equal}");
    report(&html, &outcome);
}

#[test]
fn requests_that_make_no_sense_are_refused_before_any_work() {
    let absent = MODEL.0.path().join("absent/r.html");
    for (args, words) in [
        (vec!["sweep", model(), "--bits", "8..2"], "2..8"),
        (vec!["sweep", model(), "--step", "0"], "larger one"),
        (vec!["sweep", model(), "--references", "q9"], "q4_k"),
        (vec!["sweep", model(), "--formats", "int9"], "int8"),
        (vec!["compare", model(), "--formats", "rate"], "rate:4.5"),
        (vec!["compare", model(), "--formats", "rate:4:tree"], "rate:4:tree"),
        (vec!["compare", model(), "--layers", "900"], "exceeds"),
        (vec!["compare", model(), "--quantizers", "row"], "int8"),
    ] {
        let output = codecllm(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(words), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let output = codecllm(&["compare", model(), "-o", absent.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("r.html"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_sweep_and_leaves_no_report() {
    let dir = TempDir::new().unwrap();
    let html = dir.path().join("s.html");
    let child = Command::new(BIN)
        .args(["sweep", model(), "--bits", "2..7", "--step", "0.1", "-o", html.to_str().unwrap()])
        .env("TMPDIR", dir.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The report's temporary file shows that the sweep has begun; the handler is set soon after.
    while fs::read_dir(dir.path()).unwrap().count() < 2 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}
