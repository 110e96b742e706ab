//! Checkpoints and archives as directories: what is written, what is refused, what survives an interruption.

use codecllm_codec::archive::{
    self, CompressOptions, Decoder, Decoders, Layers, PROVENANCE_FILE, Progress, Provenance, RateTarget, Silent,
    Status, compress, inspect, partial_path, verify, verify_with,
};
use codecllm_codec::checkpoint::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use codecllm_codec::quantize::Codes;
use codecllm_codec::{Checkpoint, Coder, Cpu, EncodeOptions, EncodedTensor, Error, Format, ScaleMode};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// One tensor to be written: name, dtype, shape.
type Spec<'a> = (&'a str, Dtype, &'a [usize]);

const MODEL: &[Spec] = &[
    ("model.embed_tokens.weight", Dtype::BF16, &[40, 48]),
    ("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[33, 48]),
    ("model.layers.0.mlp.down_proj.weight", Dtype::BF16, &[48, 70]),
    ("model.layers.0.input_layernorm.weight", Dtype::BF16, &[47]),
    ("model.layers.1.self_attn.q_proj.weight", Dtype::BF16, &[1, 48]),
    ("model.layers.1.mlp.down_proj.weight", Dtype::BF16, &[48, 1]),
    ("model.norm.weight", Dtype::F32, &[3]),
];

/// Bell-shaped weights from a seed.
fn weights(name: &str, dtype: Dtype, n: usize) -> Vec<u8> {
    let mut state = name.bytes().fold(1u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut bytes = Vec::new();
    for _ in 0..n {
        let w = (uniform() + uniform() + uniform()) * 0.1;
        match dtype {
            Dtype::BF16 => bytes.extend(half::bf16::from_f32(w).to_le_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(w).to_le_bytes()),
            Dtype::F32 => bytes.extend(w.to_le_bytes()),
            Dtype::I64 => bytes.extend((w as i64).to_le_bytes()),
            Dtype::BOOL => bytes.push(u8::from(w > 0.0)),
            other => panic!("no weights of {other}"),
        }
    }
    bytes
}

fn write_shard(path: &Path, tensors: &[Spec]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(name, d, s)| weights(name, *d, s.iter().product())).collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, dtype, shape), data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string()), ("a".to_string(), "b".to_string())]);
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn write_companions(dir: &Path) {
    fs::write(dir.join(CONFIG_FILE), r#"{"zeta": 1, "rms_norm_eps": 1e-05, "alpha": [1, 2]}"#).unwrap();
    for name in ["tokenizer.json", "LICENSE", "README.md", "chat_template.jinja"] {
        fs::write(dir.join(name), format!("the {name}")).unwrap();
    }
    fs::write(dir.join("pytorch_model.bin"), "not copied").unwrap();
}

/// A checkpoint in one file.
fn model(tensors: &[Spec]) -> TempDir {
    let dir = TempDir::new().unwrap();
    write_shard(&dir.path().join(SINGLE_FILE), tensors);
    write_companions(dir.path());
    dir
}

fn shard_name(i: usize) -> String {
    format!("model-{:05}-of-00003.safetensors", i + 1)
}

/// `MODEL` in three files with an index.
fn sharded_model() -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut weight_map = serde_json::Map::new();
    for (i, tensors) in MODEL.chunks(3).enumerate() {
        write_shard(&dir.path().join(shard_name(i)), tensors);
        weight_map.extend(tensors.iter().map(|(name, ..)| (name.to_string(), json!(shard_name(i)))));
    }
    let index = json!({"metadata": {"total_size": 1, "more": true}, "weight_map": weight_map});
    fs::write(dir.path().join(INDEX_FILE), index.to_string()).unwrap();
    write_companions(dir.path());
    dir
}

fn options(format: Format) -> CompressOptions {
    let rate = (format == Format::Rate).then_some(RateTarget::Step(0.3));
    CompressOptions { encode: EncodeOptions { format, ..Default::default() }, rate, ..Default::default() }
}

fn cpus() -> Vec<Cpu> {
    Cpu::available().collect()
}

fn status(archive: &Path, source: Option<&Path>) -> Status {
    verify(archive, source, &cpus(), &Silent).unwrap().status
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn every_format_and_source_dtype_is_proven() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let tensors: Vec<Spec> = MODEL.iter().map(|(name, _, shape)| (*name, dtype, *shape)).collect();
        let source = model(&tensors);
        for format in Format::ALL {
            for coder in Coder::ALL {
                for scale in ScaleMode::ALL {
                    let target = TempDir::new().unwrap();
                    let archive = target.path().join("a");
                    let mut options = options(*format);
                    options.encode.coder = *coder;
                    options.encode.scale = *scale;
                    compress(source.path(), &archive, &options, &Silent).unwrap();
                    let report = verify(&archive, Some(source.path()), &cpus(), &Silent).unwrap();
                    assert_eq!(report.status, Status::Proven, "{dtype} {format} {coder} {scale}: {report:?}");
                    assert_eq!(report.checks.len(), 8);
                }
            }
        }
    }
}

#[test]
fn an_archive_is_a_checkpoint_of_aligned_safetensors() {
    let mut tensors = MODEL.to_vec();
    tensors.extend([("flags", Dtype::BOOL, &[3][..]), ("ids", Dtype::I64, &[2, 2]), ("empty", Dtype::BF16, &[0, 5])]);
    let source = model(&tensors);
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    let summary = compress(source.path(), &archive, &options(Format::Bf16), &Silent).unwrap();
    assert_eq!((summary.n_tensors, summary.n_encoded), (10, 5));

    let file = fs::read(archive.join(SINGLE_FILE)).unwrap();
    let (header_bytes, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let (original, archived) = (Checkpoint::open(source.path()).unwrap(), Checkpoint::open(&archive).unwrap());
    for (name, dtype, shape) in &tensors {
        let info = metadata.info(name).unwrap();
        let start = 8 + header_bytes + info.data_offsets.0;
        let tensor = archived.tensor(name).unwrap();
        if shape.len() == 2 && *dtype == Dtype::BF16 && shape[0] > 0 {
            assert_eq!((info.dtype, start % 64), (Dtype::U8, 0), "{name}");
            assert_eq!(tensor.data.as_ptr() as usize % 64, 0, "{name} in memory");
            assert!(EncodedTensor::is_encoded(&tensor.data));
        } else {
            assert_eq!(
                (&info.dtype, &info.shape[..], start % dtype.bitsize().div_ceil(8)),
                (dtype, *shape, 0),
                "{name}"
            );
            assert_eq!(tensor.data, original.tensor(name).unwrap().data, "{name}");
        }
    }

    let files: Vec<String> = contents(&archive).into_keys().collect();
    let copied = ["LICENSE", "README.md", "chat_template.jinja"];
    let expected = [&copied[..], &[PROVENANCE_FILE, CONFIG_FILE, SINGLE_FILE, "tokenizer.json"]].concat();
    assert_eq!(files, expected);
    let config: serde_json::Map<String, Value> =
        serde_json::from_slice(&fs::read(archive.join(CONFIG_FILE)).unwrap()).unwrap();
    assert_eq!(config.keys().collect::<Vec<_>>(), ["zeta", "rms_norm_eps", "alpha", "quantization_config"]);
    assert_eq!(config["quantization_config"]["quant_method"], "codecllm");
    let provenance = Provenance::open(&archive).unwrap();
    assert!(provenance.source.iter().any(|f| f.file == SINGLE_FILE && f.bytes == summary.source_bytes));
}

#[test]
fn shards_stay_shards() {
    let source = sharded_model();
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    assert_eq!(status(&archive, Some(source.path())), Status::Proven);
    let read_index =
        |dir: &Path| -> Value { serde_json::from_slice(&fs::read(dir.join(INDEX_FILE)).unwrap()).unwrap() };
    let (before, after) = (read_index(source.path()), read_index(&archive));
    assert_eq!(before["weight_map"], after["weight_map"]);
    let archived = Checkpoint::open(&archive).unwrap();
    let bytes: usize = archived.tensors().iter().map(|t| t.n_bytes).sum();
    assert_eq!(after["metadata"], json!({"total_size": bytes, "more": true}));
    assert_eq!(archived.shards().len(), 3);
}

#[test]
fn a_lone_file_of_another_name_is_a_checkpoint() {
    let source = TempDir::new().unwrap();
    write_shard(&source.path().join("attention.safetensors"), &MODEL[..3]);
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    assert!(archive.join("attention.safetensors").exists() && !archive.join(CONFIG_FILE).exists());
    assert_eq!(status(&archive, Some(source.path())), Status::Proven);
    write_shard(&source.path().join("more.safetensors"), &MODEL[3..]);
    assert!(message(Checkpoint::open(source.path())).contains("side by side"));
}

#[test]
fn layers_select_matrices() {
    let source = model(MODEL);
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let selected = |text: &str| {
        let mut names: Vec<&str> = text.parse::<Layers>().unwrap().select(&checkpoint).unwrap().into_iter().collect();
        names.sort();
        names
    };
    let matrices = ["model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"];
    let [embedding, down, q] = matrices.map(|m| format!("{m}.weight"));
    assert_eq!(selected("all").len(), 5);
    assert_eq!(selected("1"), [&q]);
    assert_eq!(selected("2"), [&down, &q]);
    assert_eq!(selected("1..2"), [&down]);
    assert_eq!(selected("embed"), [&embedding]);
    assert!(message("5".parse::<Layers>().unwrap().select(&checkpoint)).contains("4 linear layers"));
    assert!(message("nothing".parse::<Layers>().unwrap().select(&checkpoint)).contains("selects none"));
}

#[test]
fn the_number_of_threads_does_not_show() {
    let source = sharded_model();
    let target = TempDir::new().unwrap();
    let mut archives = Vec::new();
    for n in [1, 2, 5] {
        let archive = target.path().join(n.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| compress(source.path(), &archive, &options(Format::Int8), &Silent)).unwrap();
        archives.push(contents(&archive));
    }
    assert!(archives.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn inspect_counts_every_byte() {
    let source = sharded_model();
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    let summary = compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    let inspection = inspect(&archive, &Silent).unwrap();
    let files = contents(&archive);
    let counted = files.iter().filter(|(name, _)| name.contains("safetensors") || *name == PROVENANCE_FILE);
    assert_eq!(inspection.total.bytes, counted.map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
    assert_eq!((inspection.total.n_weights, inspection.total.bytes), (summary.n_weights, summary.archive_bytes));
    for t in &inspection.tensors {
        let Some(b) = &t.bits else {
            assert_eq!((t.coder.as_str(), t.entropy_bits), ("none", None));
            continue;
        };
        let sum = b.payload + b.raw + b.tables + b.offsets + b.states + b.scales + b.patches + b.header + b.padding;
        assert!((sum - t.bits_per_weight).abs() < 1e-9, "{}", t.name);
        assert!(t.entropy_bits.unwrap() <= 8.0 && t.relative_error < 0.02);
    }
    let plain = inspect(source.path(), &Silent).unwrap();
    assert!(plain.encoded.is_none() && plain.provenance.is_none());
}

/// Runs `f` on every file of `dir`, and puts the file back.
fn for_each_file(dir: &Path, mut f: impl FnMut(&str, &[u8], &dyn Fn(&[u8]))) {
    for (name, bytes) in contents(dir) {
        let path = dir.join(&name);
        f(&name, &bytes, &|damaged| fs::write(&path, damaged).unwrap());
        fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn every_damaged_byte_and_every_truncation_is_found() {
    let source = model(&[("a.weight", Dtype::BF16, &[3, 8]), ("norm.weight", Dtype::BF16, &[5])]);
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    let verify = || verify(&archive, None, &[Cpu::Scalar], &Silent).unwrap();
    assert_eq!(verify().status, Status::Proven);
    for_each_file(&archive, |name, bytes, write| {
        for i in 0..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[i] ^= 1 << (i % 8);
            write(&damaged);
            assert_eq!(verify().status, Status::Wrong, "{name}: byte {i} of {}", bytes.len());
            write(&bytes[..i]);
            assert_eq!(verify().status, Status::Wrong, "{name}: cut to {i} of {}", bytes.len());
        }
        write(&[bytes, b" "].concat());
        assert_eq!(verify().status, Status::Wrong, "{name}: a byte too many");
    });
    assert_eq!(verify().status, Status::Proven);
}

#[test]
fn a_truncated_safetensors_file_does_not_open() {
    let source = model(&MODEL[..2]);
    let bytes = fs::read(source.path().join(SINGLE_FILE)).unwrap();
    for length in 0..bytes.len() {
        fs::write(source.path().join(SINGLE_FILE), &bytes[..length]).unwrap();
        let error = message(Checkpoint::open(source.path()));
        assert!(error.contains("truncated") || error.contains("malformed"), "{length}: {error}");
    }
    fs::write(source.path().join(SINGLE_FILE), [&bytes[..], b"x"].concat()).unwrap();
    assert!(message(Checkpoint::open(source.path())).contains("damaged"));
}

#[test]
fn verify_tells_what_is_missing_from_what_is_wrong() {
    let source = sharded_model();
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Bf16), &Silent).unwrap();

    assert_eq!(status(&target.path().join("absent"), None), Status::Unchecked);
    assert_eq!(status(&archive, Some(&target.path().join("absent"))), Status::Unchecked);
    let shard = archive.join(shard_name(1));
    fs::rename(&shard, target.path().join("aside")).unwrap();
    assert_eq!(status(&archive, None), Status::Unchecked);
    fs::rename(target.path().join("aside"), &shard).unwrap();
    assert_eq!(status(&archive, Some(source.path())), Status::Proven);

    // A file that would be opened instead of the shards is not the archive's.
    fs::copy(&shard, archive.join(SINGLE_FILE)).unwrap();
    assert_eq!(status(&archive, None), Status::Wrong);
    fs::remove_file(archive.join(SINGLE_FILE)).unwrap();

    let checks_of = |source: &Path| {
        let report = verify(&archive, Some(source), &cpus(), &Silent).unwrap();
        let wrong: Vec<_> = report.checks.iter().filter(|c| c.status == Status::Wrong).map(|c| c.name).collect();
        (wrong, format!("{:?}", report.checks))
    };
    let config = fs::read(source.path().join(CONFIG_FILE)).unwrap();
    fs::write(source.path().join(CONFIG_FILE), "{}").unwrap();
    assert_eq!(checks_of(source.path()).0, ["source.config"]);
    fs::write(source.path().join(CONFIG_FILE), config).unwrap();
    fs::write(source.path().join("tokenizer.json"), "another").unwrap();
    assert_eq!(checks_of(source.path()).0, ["source.files"]);

    // One bit of one weight.
    let path = source.path().join(shard_name(0));
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let (wrong, details) = checks_of(source.path());
    assert_eq!(wrong, ["source.tensors", "source.weights", "source.files"]);
    assert!(details.contains("not the one that the archive was made from"), "{details}");
}

/// Another machine's decoder: what it makes of the reference's codes.
struct Elsewhere<F>(F);

impl<F: Fn(Vec<u16>) -> Result<Vec<u16>, String> + Sync> Decoder for Elsewhere<F> {
    fn name(&self) -> &str {
        "elsewhere"
    }

    fn decode(&self, tensor: &EncodedTensor) -> Result<Codes<'static>, String> {
        let Codes::U16(codes) = tensor.decode_codes(Cpu::Scalar).unwrap() else { panic!("bf16 has codes of 16 bits") };
        Ok(Codes::U16((self.0)(codes.into_owned())?.into()))
    }
}

#[test]
fn another_machines_decoder_is_proven_like_those_of_this_one() {
    let source = sharded_model();
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Bf16), &Silent).unwrap();
    let check = |other: &dyn Decoder| {
        let decoders = Decoders { cpus: &[Cpu::Scalar], other: Some(other) };
        let report = verify_with(&archive, None, &decoders, &Silent).unwrap();
        let check = report.checks.into_iter().find(|c| c.name == "decoders").unwrap();
        assert_eq!(report.status, check.status);
        (check.status, check.detail)
    };
    let (status, detail) = check(&Elsewhere(Ok));
    assert_eq!(status, Status::Proven, "{detail}");
    assert!(detail.starts_with("elsewhere and the scalar reference decode"), "{detail}");

    let one_bit_off = |mut codes: Vec<u16>| {
        *codes.last_mut().unwrap() ^= 1;
        Ok(codes)
    };
    let one_short = |mut codes: Vec<u16>| {
        codes.pop();
        Ok(codes)
    };
    for (status, detail) in [check(&Elsewhere(one_bit_off)), check(&Elsewhere(one_short))] {
        assert_eq!(status, Status::Wrong);
        assert!(detail.contains("q_proj") && detail.contains("elsewhere decodes other codes"), "{detail}");
    }
    let (status, detail) = check(&Elsewhere(|_| Err("out of memory".to_string())));
    assert_eq!(status, Status::Unchecked);
    assert!(detail.contains("elsewhere: out of memory"), "{detail}");
}

#[test]
fn hostile_indexes_are_refused() {
    let refused = |edit: &dyn Fn(&mut Value), expected: &str| {
        let source = sharded_model();
        let path = source.path().join(INDEX_FILE);
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut index);
        fs::write(&path, index.to_string()).unwrap();
        let error = message(Checkpoint::open(source.path()));
        assert!(error.contains(expected), "{error}");
    };
    let norm = "model.norm.weight";
    for name in ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "x.bin", "a\\x.safetensors"] {
        refused(&|index| index["weight_map"][norm] = json!(name), "same directory");
    }
    refused(&|index| index["weight_map"][norm] = json!("model-9.safetensors"), "not there");
    let moved = "model.layers.1.mlp.down_proj.weight";
    refused(&|index| index["weight_map"][moved] = json!(shard_name(0)), "but it is in");
    refused(&|index| index["weight_map"]["absent"] = json!(shard_name(0)), "it is not there");
    refused(&|index| index["weight_map"] = json!({}), "no tensor");
    refused(&|index| index["weight_map"] = json!([1]), "JSON object");
    refused(&|index| *index = json!({}), "weight_map");
    let drop_one = |index: &mut Value| {
        index["weight_map"].as_object_mut().unwrap().remove(moved);
    };
    refused(&drop_one, "lacks tensor");

    let source = sharded_model();
    let path = source.path().join(INDEX_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let twice = text.replacen(r#""weight_map":{"#, &format!(r#""weight_map":{{"{norm}":"{}","#, shard_name(0)), 1);
    fs::write(&path, twice).unwrap();
    assert!(message(Checkpoint::open(source.path())).contains("twice"));
    fs::write(&path, text).unwrap();
    write_shard(&source.path().join(shard_name(1)), &MODEL[2..6]);
    assert!(message(Checkpoint::open(source.path())).contains("is in model-00001-of-00003.safetensors too"));
}

#[test]
fn a_provenance_that_leads_elsewhere_is_refused() {
    let (source, target) = (model(MODEL), TempDir::new().unwrap());
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    let path = archive.join(PROVENANCE_FILE);
    let mut provenance: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    provenance["files"][0]["file"] = json!("../../etc/passwd");
    // Whoever forges the names can forge the hash.
    provenance["sha256"] = json!("");
    let text = |value: &Value| serde_json::to_string_pretty(value).unwrap() + "\n";
    provenance["sha256"] = json!(format!("{:x}", Sha256::digest(text(&provenance))));
    fs::write(&path, text(&provenance)).unwrap();
    assert!(message(Provenance::open(&archive)).contains("not a file of the same directory"));
}

#[test]
fn hostile_headers_are_refused() {
    let dir = TempDir::new().unwrap();
    let open = |header: &str, data: usize| {
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat();
        fs::write(dir.path().join(SINGLE_FILE), bytes).unwrap();
        Checkpoint::open(dir.path())
    };
    let tensor = |name: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let a = tensor("a", "[2,2]", "[0,8]");
    open(&format!("{{{a}}}"), 8).unwrap();
    let refused = [
        (format!("{{{a},{a}}}"), 8),
        (format!("{{{a},{}}}", tensor("b", "[2,2]", "[4,12]")), 12),
        (format!("{{{}}}", tensor("a", "[2,2]", "[2,10]")), 10),
        (format!("{{{}}}", tensor("a", "[3,2]", "[0,8]")), 8),
        (format!("{{{}}}", tensor("a", "[4294967296,4294967296,4]", "[0,8]")), 8),
        (format!("{{{}}}", tensor("a", "[2,2]", "[0,18446744073709551615]")), 8),
        (format!("{{{a}"), 8),
        ("[]".into(), 0),
    ];
    for (header, data) in refused {
        assert!(open(&header, data).is_err(), "{header}");
    }
    fs::write(dir.path().join(SINGLE_FILE), u64::MAX.to_le_bytes()).unwrap();
    assert!(message(Checkpoint::open(dir.path())).contains("not safetensors"));
}

#[test]
fn what_holds_no_weights_says_what_was_looked_for() {
    let dir = TempDir::new().unwrap();
    let error = message(Checkpoint::open(dir.path()));
    assert!(error.contains(SINGLE_FILE) && error.contains(INDEX_FILE), "{error}");
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(message(Checkpoint::open(dir.path())).contains("save_pretrained"));
    assert!(matches!(Checkpoint::open(dir.path().join("absent")), Err(Error::Io { .. })));
    assert!(message(Checkpoint::open(dir.path().join("pytorch_model.bin"))).contains("is a file"));
}

#[test]
fn compressed_sources_are_refused() {
    let source = model(MODEL);
    let target = TempDir::new().unwrap();
    let (archive, again) = (target.path().join("a"), target.path().join("b"));
    compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    let refused = |expected: &str, src: &Path| {
        let error = message(compress(src, &again, &options(Format::Int8), &Silent));
        assert!(error.contains(expected), "{error}");
        assert!(!again.exists() && !partial_path(&again).exists());
    };
    refused("archive already", &archive);
    for name in [PROVENANCE_FILE, CONFIG_FILE] {
        fs::remove_file(archive.join(name)).unwrap();
        refused("archive already", &archive);
    }
    fs::write(source.path().join(CONFIG_FILE), r#"{"quantization_config": {"quant_method": "gptq"}}"#).unwrap();
    refused("gptq", source.path());
    fs::write(source.path().join(CONFIG_FILE), "[]").unwrap();
    refused("config.json", source.path());
}

/// A checkpoint whose second matrix has an infinite weight.
fn infinite_model() -> TempDir {
    let source = model(&MODEL[..4]);
    let path = source.path().join(SINGLE_FILE);
    let mut bytes = fs::read(&path).unwrap();
    let info = Checkpoint::open(source.path()).unwrap().info("model.layers.0.mlp.down_proj.weight").unwrap().clone();
    bytes[info.offset as usize + 70 * 2..][..2].copy_from_slice(&0x7f80u16.to_le_bytes());
    fs::write(path, bytes).unwrap();
    source
}

#[test]
fn infinite_weights_are_named_and_leave_nothing() {
    let source = infinite_model();
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    let error = message(compress(source.path(), &archive, &options(Format::Int8), &Silent));
    for part in ["model.safetensors", "model.layers.0.mlp.down_proj.weight", "row 1, column 0", "inf"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(contents(target.path()).len(), 0);
    compress(source.path(), &archive, &options(Format::Bf16), &Silent).unwrap();
    assert_eq!(status(&archive, Some(source.path())), Status::Proven);
}

#[test]
fn an_existing_target_is_replaced_only_by_force_and_only_at_the_end() {
    let source = model(MODEL);
    let target = TempDir::new().unwrap();
    let archive = target.path().join("a");
    compress(source.path(), &archive, &options(Format::Bf16), &Silent).unwrap();
    let before = contents(&archive);
    let unchanged = || {
        assert_eq!(contents(&archive), before);
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 1, "nothing else is left");
    };
    assert!(message(compress(source.path(), &archive, &options(Format::Int8), &Silent)).contains("--force"));
    unchanged();
    let forced = CompressOptions { force: true, ..options(Format::Int8) };
    compress(infinite_model().path(), &archive, &forced, &Silent).unwrap_err();
    unchanged();
    compress(source.path(), &archive, &forced, &Silent).unwrap();
    assert_ne!(contents(&archive), before);
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 1);
    assert_eq!(status(&archive, Some(source.path())), Status::Proven);

    // An older archive that a crash left aside comes back.
    fs::rename(&archive, target.path().join("a.replaced")).unwrap();
    assert!(message(compress(source.path(), &archive, &options(Format::Int8), &Silent)).contains("--force"));
    assert!(archive.join(PROVENANCE_FILE).exists());
}

#[test]
fn what_is_not_an_archive_is_never_replaced() {
    let source = model(MODEL);
    let forced = CompressOptions { force: true, ..options(Format::Int8) };
    let refused = |dst: &Path, expected: &str| {
        let error = message(compress(source.path(), dst, &forced, &Silent));
        assert!(error.contains(expected), "{error}");
    };
    refused(source.path(), "is or holds the source");
    refused(source.path().parent().unwrap(), "is or holds the source");
    refused(Path::new("/"), "name of its own");
    let target = TempDir::new().unwrap();
    fs::write(target.path().join("notes.txt"), "mine").unwrap();
    refused(target.path(), "not an archive");
    fs::write(target.path().join("file"), "mine").unwrap();
    refused(&target.path().join("file"), "not an archive");
    let foreign = target.path().join("b.partial");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("notes.txt"), "mine").unwrap();
    refused(&target.path().join("b"), "move them away");
    assert!(foreign.join("notes.txt").exists());
    let archive = target.path().join("archive");
    compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
    let aside = target.path().join("archive.replaced");
    fs::create_dir(&aside).unwrap();
    fs::write(aside.join("notes.txt"), "mine").unwrap();
    refused(&archive, "in the way");
    assert!(aside.join("notes.txt").exists());
    let empty = target.path().join("empty");
    fs::create_dir(&empty).unwrap();
    compress(source.path(), &empty, &forced, &Silent).unwrap();
    refused(&target.path().join("file").join("deeper"), "file");
}

/// Stops after some tensors, and keeps the notes.
#[derive(Default)]
struct StopAfter {
    n_left: AtomicUsize,
    notes: std::sync::Mutex<Vec<String>>,
}

impl StopAfter {
    fn new(n: usize) -> Self {
        Self { n_left: AtomicUsize::new(n), ..Default::default() }
    }

    fn notes(&self) -> String {
        self.notes.lock().unwrap().join("\n")
    }
}

impl Progress for StopAfter {
    fn tensor(&self, _name: &str) {
        self.n_left.fetch_sub(1, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.n_left.load(Ordering::Relaxed) == 0
    }

    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.into());
    }
}

const NEVER: usize = usize::MAX;

/// A run that stopped in the second of three shards, and the archive of a run that did not.
struct Interrupted {
    source: TempDir,
    target: TempDir,
    archive: PathBuf,
    complete: BTreeMap<String, Vec<u8>>,
}

impl Interrupted {
    fn new() -> Self {
        let (source, target) = (sharded_model(), TempDir::new().unwrap());
        let archive = target.path().join("a");
        compress(source.path(), &archive, &options(Format::Int8), &Silent).unwrap();
        let complete = contents(&archive);
        fs::remove_dir_all(&archive).unwrap();
        let result = compress(source.path(), &archive, &options(Format::Int8), &StopAfter::new(5));
        assert!(matches!(result, Err(Error::Interrupted)));
        let s = Self { source, target, archive, complete };
        assert!(!s.archive.exists());
        let partial: Vec<String> = contents(&partial_path(&s.archive)).into_keys().collect();
        assert_eq!(partial, [".codecllm-journal.json", &shard_name(0)], "one shard was finished");
        assert_ne!(status(&partial_path(&s.archive), None), Status::Proven);
        s
    }

    /// Resumes; the number of shards taken over, and the notes.
    fn resume(&self, format: Format) -> (usize, String) {
        let progress = StopAfter::new(NEVER);
        let options = CompressOptions { resume: true, ..options(format) };
        let summary = compress(self.source.path(), &self.archive, &options, &progress).unwrap();
        assert_eq!(status(&self.archive, Some(self.source.path())), Status::Proven);
        assert_eq!(fs::read_dir(self.target.path()).unwrap().count(), 1, "the partial directory is gone");
        (summary.n_resumed_shards, progress.notes())
    }
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let run = Interrupted::new();
    assert_eq!(run.resume(Format::Int8), (1, String::new()));
    assert_eq!(contents(&run.archive), run.complete);
}

#[test]
fn resume_reuses_nothing_that_would_differ() {
    let run = Interrupted::new();
    let (n, notes) = run.resume(Format::Fp8);
    assert!(n == 0 && notes.contains("other options"), "{notes}");

    let run = Interrupted::new();
    write_shard(
        &run.source.path().join(shard_name(0)),
        &[MODEL[0], MODEL[1], ("model.layers.0.mlp.down_proj.weight", Dtype::BF16, &[48, 71])],
    );
    let (n, notes) = run.resume(Format::Int8);
    assert!(n == 0 && notes.contains("has changed"), "{notes}");

    let run = Interrupted::new();
    let shard = partial_path(&run.archive).join(shard_name(0));
    let mut bytes = fs::read(&shard).unwrap();
    bytes[1000] ^= 1;
    fs::write(shard, bytes).unwrap();
    let (n, notes) = run.resume(Format::Int8);
    assert!(n == 0 && notes.contains("damaged"), "{notes}");
    assert_eq!(contents(&run.archive), run.complete);

    let run = Interrupted::new();
    fs::write(partial_path(&run.archive).join(".codecllm-journal.json"), "{").unwrap();
    assert_eq!(run.resume(Format::Int8).0, 0);
    assert_eq!(contents(&run.archive), run.complete);
}

#[test]
fn without_resume_a_run_starts_over() {
    let run = Interrupted::new();
    let progress = StopAfter::new(NEVER);
    let summary = compress(run.source.path(), &run.archive, &options(Format::Int8), &progress).unwrap();
    assert_eq!(summary.n_resumed_shards, 0);
    assert!(progress.notes().contains("--resume"), "{}", progress.notes());
    assert_eq!(contents(&run.archive), run.complete);
}

#[test]
fn a_run_that_was_killed_resumes() {
    let run = Interrupted::new();
    // What a kill in the middle of a shard leaves.
    fs::write(run.target.path().join("a.partial").join(format!("{}.unfinished", shard_name(1))), "half").unwrap();
    fs::write(run.target.path().join("a.partial/.codecllm-journal.json.new"), "{\"ver").unwrap();
    assert_eq!(run.resume(Format::Int8), (1, String::new()));
    assert_eq!(contents(&run.archive), run.complete);
}

#[test]
#[cfg(unix)]
fn two_runs_do_not_write_to_one_place() {
    /// Starts a second run to the same place during the first.
    struct Second<'a>(&'a Path, &'a Path, std::sync::Mutex<Vec<String>>);
    impl Progress for Second<'_> {
        fn tensor(&self, _name: &str) {
            self.2.lock().unwrap().push(message(compress(self.0, self.1, &options(Format::Int8), &Silent)));
        }
    }
    let (source, target) = (model(MODEL), TempDir::new().unwrap());
    let archive = target.path().join("a");
    let progress = Second(source.path(), &archive, Default::default());
    compress(source.path(), &archive, &options(Format::Int8), &progress).unwrap();
    assert!(progress.2.lock().unwrap().iter().all(|e| e.contains("another run")));
    assert_eq!(status(&archive, Some(source.path())), Status::Proven);
}

#[test]
fn companions_are_what_goes_with_a_model() {
    for name in
        ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "NOTICE", "README.md"]
    {
        assert!(archive::is_companion(name), "{name}");
    }
    for name in [
        CONFIG_FILE,
        INDEX_FILE,
        PROVENANCE_FILE,
        SINGLE_FILE,
        "pytorch_model.bin.index.json",
        "x.gguf",
        ".gitattributes",
    ] {
        assert!(!archive::is_companion(name), "{name}");
    }
}

/// A model large enough that sizes mean something.
fn large_model() -> TempDir {
    let tensors: Vec<Spec> = LARGE_MODEL.iter().map(|(name, shape)| (*name, Dtype::BF16, *shape)).collect();
    model(&tensors)
}

const LARGE_MODEL: [(&str, &[usize]); 4] = [
    ("model.embed_tokens.weight", &[2000, 256]),
    ("model.layers.0.self_attn.q_proj.weight", &[256, 256]),
    ("model.layers.0.mlp.down_proj.weight", &[256, 700]),
    ("model.norm.weight", &[256]),
];

fn rate_options(target: RateTarget) -> CompressOptions {
    CompressOptions { rate: Some(target), ..options(Format::Rate) }
}

#[test]
fn rate_meets_its_target_and_fewer_bits_mean_more_error() {
    let source = large_model();
    let target = TempDir::new().unwrap();
    let mut errors = Vec::new();
    for (bits, trellis) in [7.0, 5.5, 4.0, 3.0, 2.2, 1.5].into_iter().flat_map(|bits| [(bits, false), (bits, true)]) {
        // Beyond 6.3 bits a trellis has matrices that are exact, of which this model has too few.
        if trellis && bits > 6.0 {
            continue;
        }
        let archive = target.path().join(format!("{bits} {trellis}"));
        let mut options = rate_options(RateTarget::Bits(bits));
        options.encode.trellis = trellis;
        compress(source.path(), &archive, &options, &Silent).unwrap();
        let report = inspect(&archive, &Silent).unwrap();
        let found = report.total.bits_per_weight;
        assert!((found / bits - 1.0).abs() < 0.01, "{found} bits/weight instead of {bits}");
        let error: f64 = report.tensors.iter().map(|t| f64::from(t.relative_error)).sum();
        errors.push((bits, trellis, error));
        assert_eq!(verify(&archive, Some(source.path()), &cpus(), &Silent).unwrap().status, Status::Proven);
        assert_eq!(Provenance::open(&archive).unwrap().format_version, if trellis { "1.1" } else { "1.0" });
    }
    for trellis in [false, true] {
        let errors: Vec<_> = errors.iter().filter(|e| e.1 == trellis).collect();
        assert!(errors.is_sorted_by(|a, b| a.2 < b.2), "{errors:?}");
    }
    // As many bits, less error.
    for plain_and_trellis in errors[1..].chunks(2) {
        let &[plain, trellis] = plain_and_trellis else { panic!("{errors:?}") };
        assert!(trellis.0 == plain.0 && trellis.2 < 0.96 * plain.2, "{errors:?}");
    }
}

#[test]
fn rate_depends_on_source_and_target_alone() {
    let source = large_model();
    let target = TempDir::new().unwrap();
    let mut archives = Vec::new();
    for threads in [1, 3] {
        let archive = target.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = rate_options(RateTarget::Bytes(300_000));
        let summary = pool.install(|| compress(source.path(), &archive, &options, &Silent)).unwrap();
        assert!((summary.archive_bytes as f64 / 300_000.0 - 1.0).abs() < 0.01, "{}", summary.archive_bytes);
        archives.push(contents(&archive));
    }
    assert_eq!(archives[0], archives[1]);
}

#[test]
fn rate_may_count_the_selected_matrices_alone() {
    let source = large_model();
    let temp = TempDir::new().unwrap();
    let archive = temp.path().join("a");
    let layers: Layers = "down_proj|q_proj".parse().unwrap();
    let options = CompressOptions { layers, ..rate_options(RateTarget::MatrixBits(3.5)) };
    compress(source.path(), &archive, &options, &Silent).unwrap();
    let found = inspect(&archive, &Silent).unwrap().encoded.unwrap().total.bits_per_weight;
    assert!((found / 3.5 - 1.0).abs() < 0.01, "{found} bits/weight instead of 3.5");
}

/// A model of many matrices.
fn layered_model() -> TempDir {
    let roles = ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"];
    let names: Vec<String> =
        (0..12).flat_map(|i| roles.map(|role| format!("model.layers.{i}.{role}.weight"))).collect();
    let tensors: Vec<Spec> = names.iter().map(|name| (name.as_str(), Dtype::BF16, [64, 256].as_slice())).collect();
    model(&tensors)
}

#[test]
fn rate_keeps_matrices_exact_where_codes_end() {
    let source = layered_model();
    let target = TempDir::new().unwrap();
    let mut last_error = f64::INFINITY;
    for bits in [7.0, 8.2, 8.8, 9.5] {
        let archive = target.path().join(format!("{bits}"));
        let log = StopAfter::new(NEVER);
        compress(source.path(), &archive, &rate_options(RateTarget::Bits(bits)), &log).unwrap();
        assert_eq!(log.notes().contains("kept as they are"), bits > 8.0, "{bits}: {}", log.notes());
        let report = inspect(&archive, &Silent).unwrap();
        let found = report.total.bits_per_weight;
        assert!((found / bits - 1.0).abs() < 0.01, "{found} bits/weight instead of {bits}");
        let n_exact = report.tensors.iter().filter(|t| t.format == "bf16").count();
        assert_eq!(n_exact > 0, bits > 8.0, "{bits}: {n_exact} matrices are exact");
        // Those in which a bit saves most.
        let is_exact = |role: &str| report.tensors.iter().any(|t| t.format == "bf16" && t.name.contains(role));
        assert!(is_exact("v_proj") || n_exact == 0, "{bits}");
        let error: f64 = report.tensors.iter().map(|t| f64::from(t.relative_error)).sum();
        assert!(error < last_error, "{bits} bits: the error is {error}, with fewer bits it was {last_error}");
        last_error = error;
        assert_eq!(verify(&archive, Some(source.path()), &cpus(), &Silent).unwrap().status, Status::Proven);
    }
}

#[test]
fn rate_says_what_it_can_reach() {
    let source = large_model();
    let target = TempDir::new().unwrap();
    for bits in [0.01, 17.0] {
        let (dst, options) = (target.path().join("a"), rate_options(RateTarget::Bits(bits)));
        for result in [
            compress(source.path(), &dst, &options, &Silent).map(drop),
            archive::check(source.path(), &dst, &options, &Silent),
        ] {
            let message = message(result);
            assert!(message.contains("this model takes between"), "{message}");
        }
        assert!(!dst.exists());
    }
    // A lone matrix is exact or not.
    let source = model(&[("w", Dtype::BF16, &[256, 700])]);
    let result = compress(source.path(), &target.path().join("a"), &rate_options(RateTarget::Bits(8.0)), &Silent);
    let message = message(result);
    assert!(message.contains("as it is takes too much more"), "{message}");
    assert!(archive::check(source.path(), target.path(), &rate_options(RateTarget::Bits(4.0)), &Silent).is_err());
}
