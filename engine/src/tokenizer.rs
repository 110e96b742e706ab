//! From text to tokens and back, by the checkpoint's own `tokenizer.json`.

use crate::error::{Error, Result};
use codecllm_codec::checkpoint::read_file;
use serde::Deserialize;
use std::path::Path;

const TOKENIZER_FILE: &str = "tokenizer.json";
/// The settings that stand beside the tokenizer; a checkpoint may come without.
pub(crate) const SETTINGS_FILE: &str = "tokenizer_config.json";

/// Tokens of the prompt that a [`TextStream`] keeps in sight. Some decoders drop the space before a text's first word;
/// with a few tokens before it, a generated word is not the first.
const STREAM_CONTEXT: usize = 8;

/// A model's tokenizer and its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    /// What `add_bos_token` says; `None` leaves it to the post-processor of `tokenizer.json`.
    add_bos: Option<bool>,
    /// The post-processor itself puts `bos` before a text.
    inner_adds_bos: bool,
}

/// The fields of `tokenizer_config.json` that are read here.
#[derive(Deserialize, Default)]
struct Settings {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    add_bos_token: Option<bool>,
}

/// A special token as `tokenizer_config.json` spells it: its text, or an object with its text and flags.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
pub(crate) enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` where there is one, from a model's directory, or makes them of a
    /// GGUF file's metadata.
    pub fn open(dir: &Path) -> Result<Self> {
        let tokenizer = read_file(dir, TOKENIZER_FILE)?.ok_or_else(|| {
            Error::format(
                dir.join(TOKENIZER_FILE).display().to_string(),
                "there is no such file, so text cannot become tokens; copy it from the model's source (a `tokenizer.model` \
                 alone does not do: convert it with Transformers' `AutoTokenizer` and `save_pretrained`)",
            )
        })?;
        let settings = read_file(dir, SETTINGS_FILE)?;
        Self::from_json(&tokenizer, settings.as_deref())
    }

    /// Reads the texts of a `tokenizer.json` and of a `tokenizer_config.json`.
    pub fn from_json(tokenizer: &str, settings: Option<&str>) -> Result<Self> {
        let mut inner: tokenizers::Tokenizer =
            tokenizer.parse().map_err(|e: tokenizers::Error| Error::format(TOKENIZER_FILE, e.to_string()))?;
        // Settings of training batches; a prompt is neither cut nor filled up.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(failed)?;
        let settings: Settings = match settings {
            Some(text) => serde_json::from_str(text).map_err(|e| Error::format(SETTINGS_FILE, e.to_string()))?,
            None => Settings::default(),
        };
        let id = |token: &Option<SpecialToken>, name: &str| match token {
            Some(token) => inner.token_to_id(token.text()).map(Some).ok_or_else(|| {
                Error::format(SETTINGS_FILE, format!("{name} `{}` is not a token of {TOKENIZER_FILE}", token.text()))
            }),
            None => Ok(None),
        };
        let bos = id(&settings.bos_token, "bos_token")?;
        let eos = id(&settings.eos_token, "eos_token")?;
        if settings.add_bos_token == Some(true) && bos.is_none() {
            return Err(Error::format(SETTINGS_FILE, "add_bos_token is set, but there is no bos_token"));
        }
        let empty = inner.encode_fast("", true).map_err(failed)?;
        let inner_adds_bos = bos.is_some() && empty.get_ids().first().copied() == bos;
        Ok(Self { inner, bos, eos, add_bos: settings.add_bos_token, inner_adds_bos })
    }

    /// The token that begins a text, if the tokenizer has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if the tokenizer has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens of `text`. Special tokens spelled out in the text are recognized.
    ///
    /// `add_special` adds what the tokenizer puts around a text: where `tokenizer_config.json` has `add_bos_token`, that
    /// decides about the token at the start, else the post-processor of `tokenizer.json` does.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = self.inner.encode_fast(text, add_special).map_err(failed)?.get_ids().to_vec();
        if add_special {
            match (self.add_bos, self.bos) {
                (Some(true), Some(bos)) if !self.inner_adds_bos => ids.insert(0, bos),
                (Some(false), _) if self.inner_adds_bos => drop(ids.remove(0)),
                _ => {}
            }
        }
        Ok(ids)
    }

    /// The tokens of a prompt: [`encode`](Self::encode) with the special tokens, and never empty where the tokenizer has
    /// a token to begin with.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text, true)?;
        Ok(if ids.is_empty() { self.bos.into_iter().collect() } else { ids })
    }

    /// The text of `ids`, special tokens left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// A decoder for tokens that come one at a time, after `prompt`.
    pub fn stream(&self, prompt: &[u32]) -> TextStream<'_> {
        let context = prompt[prompt.len().saturating_sub(STREAM_CONTEXT)..].to_vec();
        TextStream { tokenizer: self, n_read: context.len(), ids: context }
    }
}

fn failed(e: tokenizers::Error) -> Error {
    Error::format(TOKENIZER_FILE, e.to_string())
}

/// Turns tokens into text as they come. What it gives out is whole characters; a character whose bytes are spread over
/// several tokens waits for the last of them.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens given out last (`n_read` of them), then those that wait.
    ids: Vec<u32>,
    n_read: usize,
}

impl TextStream<'_> {
    /// Takes a token and returns the text that it completes, often a word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.unread()?;
        // U+FFFD at the end stands for the first bytes of a character, most likely.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.n_read);
        self.n_read = self.ids.len();
        Ok(text)
    }

    /// The text that still waits; bytes that never became a character are U+FFFD in it.
    pub fn finish(self) -> Result<String> {
        self.unread()
    }

    /// A token's text depends on its neighbours, so the new tokens are decoded after those before them.
    fn unread(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.n_read])?;
        let mut text = self.tokenizer.decode(&self.ids)?;
        let common = before.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok(text.split_off(common))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A token for every byte, and `<s>` and `</s>`; `template` is what the post-processor makes of a text.
    fn bytes_tokenizer(template: &[&str], settings: Option<&str>) -> Result<Tokenizer> {
        let mut alphabet: Vec<_> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let texts = ["<s>".into(), "</s>".into()].into_iter().chain(alphabet.iter().map(char::to_string));
        let vocab: serde_json::Map<_, _> = texts.zip(0..).map(|(text, id)| (text, json!(id))).collect();
        let special = |id: u32, text: &str| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let piece = |name: &&str| match *name {
            "A" => json!({"Sequence": {"id": "A", "type_id": 0}}),
            name => json!({"SpecialToken": {"id": name, "type_id": 0}}),
        };
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let json = json!({
            "version": "1.0",
            "added_tokens": [special(0, "<s>"), special(1, "</s>")],
            "pre_tokenizer": byte_level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": template.iter().map(piece).collect::<Vec<_>>(),
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
            },
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        Tokenizer::from_json(&json.to_string(), settings)
    }

    /// Words behind `▁`, bytes for everything else, and a decoder that drops the space before the first word.
    fn words_tokenizer() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for (i, word) in ["<unk>", "▁a", "▁b"].iter().enumerate() {
            vocab.insert(word.to_string(), json!(i));
        }
        for byte in 0..=255u32 {
            vocab.insert(format!("<0x{byte:02X}>"), json!(byte + 3));
        }
        let json = json!({
            "version": "1.0",
            "added_tokens": [],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true},
        });
        Tokenizer::from_json(&json.to_string(), None).unwrap()
    }

    #[test]
    fn add_bos_token_decides_else_the_post_processor() {
        const SETTINGS: &str = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": ADD}"#;
        let settings = |add: &str| SETTINGS.replace("ADD", add);
        for (template, add, expected) in [
            (&["A"][..], "null", false),
            (&["A"], "false", false),
            (&["A"], "true", true),
            (&["<s>", "A"], "null", true),
            (&["<s>", "A"], "false", false),
            (&["<s>", "A"], "true", true),
        ] {
            let tokenizer = bytes_tokenizer(template, Some(&settings(add))).unwrap();
            assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(0), Some(1)));
            let bare = tokenizer.encode("<s>x", false).unwrap();
            assert_eq!((bare.len(), bare[0]), (2, 0), "special tokens in the text count as such");
            let full = tokenizer.encode("<s>x", true).unwrap();
            assert_eq!(full.len(), 2 + usize::from(expected), "{template:?}, add_bos_token {add}");
            assert_eq!(full[full.len() - 2..], bare);
            assert_eq!(tokenizer.encode_prompt("").unwrap(), [0]);
        }
        let tokenizer = bytes_tokenizer(&["A"], None).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.encode_prompt("").unwrap()), (None, vec![]));
    }

    #[test]
    fn a_stream_gives_out_whole_characters_and_all_of_the_text() {
        let tokenizer = bytes_tokenizer(&["A"], None).unwrap();
        for text in ["plain", "é", "naïve 漢字 \u{1f980}\u{1f468}\u{200d}\u{1f469} end", "a\u{FFFD}b", "\u{FFFD}"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(ids.len(), text.len(), "a token a byte");
            for prompt in [&[][..], &tokenizer.encode("before 漢", false).unwrap()] {
                let mut stream = tokenizer.stream(prompt);
                let mut pieces: Vec<_> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
                pieces.push(stream.finish().unwrap());
                assert_eq!(pieces.concat(), text);
                if !text.contains(char::REPLACEMENT_CHARACTER) {
                    assert!(pieces.iter().all(|piece| piece.chars().count() <= 1), "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn bytes_that_never_become_a_character_are_replaced() {
        let tokenizer = bytes_tokenizer(&["A"], None).unwrap();
        let crab = tokenizer.encode("\u{1f980}x", false).unwrap();
        let mut stream = tokenizer.stream(&[]);
        let (lead, last) = (crab[0], crab[4]);
        assert_eq!(stream.push(lead).unwrap(), "");
        assert_eq!(stream.push(last).unwrap(), "\u{FFFD}x");
        assert_eq!(stream.push(lead).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
    }

    #[test]
    fn a_generated_word_keeps_its_space() {
        let tokenizer = words_tokenizer();
        assert_eq!(tokenizer.decode(&[1, 2]).unwrap(), "a b");
        let mut stream = tokenizer.stream(&[1]);
        let e_acute = [0xC3 + 3, 0xA9 + 3];
        let pieces: Vec<_> = [2, 1, e_acute[0], e_acute[1], 2].iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(pieces, [" b", " a", "", "é", " b"]);
    }

    #[test]
    fn bad_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("no such file"), "{error}");
        let error = Tokenizer::from_json("{}", None).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        let error = bytes_tokenizer(&["A"], Some(r#"{"bos_token": "<bos>"}"#)).err().unwrap().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("<bos>"), "{error}");
        assert!(bytes_tokenizer(&["A"], Some(r#"{"add_bos_token": true}"#)).is_err());
    }
}
