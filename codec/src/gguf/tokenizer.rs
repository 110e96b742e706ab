//! `tokenizer.json` and `tokenizer_config.json` from a GGUF file's metadata.
//!
//! Two kinds of vocabularies are known. `gpt2`: byte-level BPE with its merges, whose pre-tokenizer the file only names, so that the
//! expressions stand here. `llama`: SentencePiece's BPE with scores, from which the merges are derived.

use super::Gguf;
use crate::archive::to_pretty_json;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

const TOKENS: &str = "tokenizer.ggml.tokens";
/// Tokens of real vocabularies have up to some 200.
const MAX_TOKEN_BYTES: usize = 1024;
/// Token types of GGUF.
const UNKNOWN: u32 = 2;
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// The tokens that mark a text's beginning and end.
pub(super) struct SpecialTokens {
    pub(super) bos: Option<usize>,
    /// The end of a text first, then those of a turn and of a message.
    pub(super) ends: Vec<usize>,
    unknown: Option<usize>,
    padding: Option<usize>,
    /// Whether a text begins with `bos`.
    adds_bos: bool,
}

/// How byte-level BPE cuts a text before it merges.
struct PreTokenizer {
    /// What `tokenizer.ggml.pre` calls it.
    names: &'static [&'static str],
    pattern: Pattern,
    /// A piece that is a token stays whole, whatever the merges.
    ignores_merges: bool,
    adds_bos: bool,
    normalizer: Option<&'static str>,
}

enum Pattern {
    /// GPT-2's, which the byte-level step itself has.
    Gpt2,
    /// GPT-2's, with digits one by one.
    Gpt2Digits,
    /// An expression.
    Expression(&'static str),
}

/// The expressions are those of the models' own `tokenizer.json`.
const PRE_TOKENIZERS: [PreTokenizer; 5] = [
    PreTokenizer {
        names: &["gpt-2", "default", "olmo", "mpt"],
        pattern: Pattern::Gpt2,
        ignores_merges: false,
        adds_bos: false,
        normalizer: None,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        pattern: Pattern::Gpt2Digits,
        ignores_merges: false,
        adds_bos: false,
        normalizer: None,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        pattern: Pattern::Expression(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignores_merges: true,
        adds_bos: true,
        normalizer: None,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2"],
        pattern: Pattern::Expression(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignores_merges: false,
        adds_bos: false,
        normalizer: Some("NFC"),
    },
    PreTokenizer {
        names: &["tekken"],
        pattern: Pattern::Expression(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignores_merges: true,
        adds_bos: true,
        normalizer: None,
    },
];

impl Gguf {
    fn is_sentence_piece(&self) -> Result<bool> {
        Ok(self.text("tokenizer.ggml.model")? == Some("llama"))
    }

    fn pre_tokenizer(&self) -> Result<&'static PreTokenizer> {
        let name = self.text("tokenizer.ggml.pre")?.unwrap_or("default");
        PRE_TOKENIZERS.iter().find(|p| p.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|p| p.names).copied().collect();
            Error::unsupported(
                &self.what,
                format!("its tokenizer's pre-tokenizer is `{name}`; supported are {}", known.join(", ")),
            )
        })
    }

    pub(super) fn special_tokens(&self) -> Result<SpecialTokens> {
        let is_sentence_piece = self.is_sentence_piece()?;
        let or_default = |default: usize| is_sentence_piece.then_some(default);
        let id = |name: &str| self.size(&format!("tokenizer.ggml.{name}_token_id"));
        let eos = id("eos")?.or(or_default(2));
        let mut ends: Vec<usize> = Vec::new();
        for end in [eos, id("eot")?, id("eom")?].into_iter().flatten() {
            if !ends.contains(&end) {
                ends.push(end);
            }
        }
        let adds_bos = match self.bool("tokenizer.ggml.add_bos_token")? {
            Some(adds) => adds,
            None => is_sentence_piece || self.pre_tokenizer().is_ok_and(|p| p.adds_bos),
        };
        let bos = id("bos")?.or(or_default(1));
        Ok(SpecialTokens { bos, ends, unknown: id("unknown")?.or(or_default(0)), padding: id("padding")?, adds_bos })
    }

    /// `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// A kind of vocabulary or a pre-tokenizer that is not known; metadata that is missing or malformed.
    pub(super) fn tokenizer_files(&self) -> Result<Vec<(String, String)>> {
        let tokens = self.texts(TOKENS)?.ok_or_else(|| self.bad(TOKENS, "an array of texts"))?;
        let special = self.special_tokens()?;
        let ids = [special.bos, special.unknown, special.padding];
        for id in ids.into_iter().flatten().chain(special.ends.iter().copied()) {
            if id >= tokens.len() {
                return Err(Error::format(
                    &self.what,
                    format!("token {id} is named as a special one, but the vocabulary has {} tokens", tokens.len()),
                ));
            }
        }
        let types = self.token_types(tokens.len())?;
        let mut vocab = Map::new();
        for (id, token) in tokens.iter().enumerate() {
            if token.len() > MAX_TOKEN_BYTES {
                return Err(Error::format(
                    &self.what,
                    format!("token {id} has {} bytes; at most {MAX_TOKEN_BYTES} are read", token.len()),
                ));
            }
            if let Some(other) = vocab.insert(token.clone(), json!(id)) {
                return Err(Error::format(&self.what, format!("the tokens {other} and {id} are both `{token}`")));
            }
        }
        let adds = special.bos.filter(|_| special.adds_bos);
        let mut tokenizer = match self.text("tokenizer.ggml.model")? {
            Some("gpt2") => self.byte_level(vocab)?,
            Some("llama") => self.sentence_piece(vocab, &tokens, &special)?,
            other => {
                return Err(Error::unsupported(
                    &self.what,
                    format!("its tokenizer is `{}`; supported are gpt2, llama", other.unwrap_or("missing")),
                ));
            }
        };
        let is_special = |id: usize| matches!(types[id], UNKNOWN | CONTROL) || special.ends.contains(&id);
        let added = (0..tokens.len()).filter(|&id| is_special(id) || types[id] == USER_DEFINED);
        let added = added.map(|id| {
            json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": is_special(id)})
        });
        tokenizer["added_tokens"] = added.collect();
        tokenizer["post_processor"] = template(adds.map(|id| (id, tokens[id].as_str())));

        let mut settings = Map::new();
        settings.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        let named = [
            ("bos_token", special.bos),
            ("eos_token", special.ends.first().copied()),
            ("unk_token", special.unknown),
            ("pad_token", special.padding),
        ];
        for (name, id) in named.into_iter().filter_map(|(name, id)| Some((name, id?))) {
            settings.insert(name.into(), json!(tokens[id]));
        }
        if special.bos.is_some() {
            settings.insert("add_bos_token".into(), json!(special.adds_bos));
        }
        settings.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(template) = self.text("tokenizer.chat_template")? {
            settings.insert("chat_template".into(), json!(template));
        }
        Ok(vec![
            ("tokenizer.json".into(), to_pretty_json(&tokenizer)),
            ("tokenizer_config.json".into(), to_pretty_json(&settings)),
        ])
    }

    /// A type for every token.
    fn token_types(&self, n_tokens: usize) -> Result<Vec<u32>> {
        const KEY: &str = "tokenizer.ggml.token_type";
        match self.numbers(KEY)? {
            Some(types) if types.len() == n_tokens => Ok(types.into_iter().map(|t| t as u32).collect()),
            Some(_) => Err(self.bad(KEY, &format!("an array of {n_tokens} values, one a token,"))),
            None => Ok(vec![1; n_tokens]),
        }
    }

    fn byte_level(&self, vocab: Map<String, Value>) -> Result<Value> {
        const KEY: &str = "tokenizer.ggml.merges";
        let merges = self.texts(KEY)?.ok_or_else(|| self.bad(KEY, "an array of texts"))?;
        // The first character may itself be a space in some vocabularies.
        let pairs = merges.iter().map(|merge| {
            let first = merge.chars().next().map_or(0, char::len_utf8);
            let at = merge[first..].find(' ').map(|at| first + at);
            at.map(|at| json!([merge[..at], merge[at + 1..]]))
                .ok_or_else(|| Error::format(&self.what, format!("the merge `{merge}` is not two tokens")))
        });
        let pairs: Vec<Value> = pairs.collect::<Result<_>>()?;
        let pre = self.pre_tokenizer()?;
        let bytes = |uses_expression: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": uses_expression});
        let in_turn = |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
        let pre_tokenizer = match pre.pattern {
            Pattern::Gpt2 => bytes(true),
            Pattern::Gpt2Digits => in_turn(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
            Pattern::Expression(expression) => in_turn(
                json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false}),
                bytes(false),
            ),
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": pre.normalizer.map(|kind| json!({"type": kind})),
            "pre_tokenizer": pre_tokenizer,
            "post_processor": null,
            "decoder": bytes(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": pre.ignores_merges, "vocab": vocab, "merges": pairs,
            },
        }))
    }

    fn sentence_piece(&self, vocab: Map<String, Value>, tokens: &[String], special: &SpecialTokens) -> Result<Value> {
        const KEY: &str = "tokenizer.ggml.scores";
        let scores = self.numbers(KEY)?.filter(|scores| scores.len() == tokens.len());
        let scores =
            scores.ok_or_else(|| self.bad(KEY, &format!("an array of {} numbers, one a token,", tokens.len())))?;
        let has_prefix = self.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if has_prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": special.unknown.map(|id| &tokens[id]),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                "ignore_merges": false, "vocab": vocab, "merges": merges_by_score(tokens, &scores),
            },
        }))
    }
}

/// SentencePiece joins the neighbours whose union has the best score. As a list of merges: every way to cut a token into two tokens,
/// best score first, and of one token's the ways in the order of their parts' ids.
fn merges_by_score(tokens: &[String], scores: &[f64]) -> Vec<[String; 2]> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(&left), Some(&right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                merges.push((id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    merges.into_iter().map(|(_, left, right)| [tokens[left].clone(), tokens[right].clone()]).collect()
}

/// The post-processor that puts a token before a text.
fn template(bos: Option<(usize, &str)>) -> Value {
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let mut single = vec![sequence("A", 0)];
    let mut special = Map::new();
    if let Some((id, token)) = bos {
        single.insert(0, json!({"SpecialToken": {"id": token, "type_id": 0}}));
        special.insert(token.into(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": [sequence("A", 0), sequence("B", 1)],
        "special_tokens": special,
    })
}
