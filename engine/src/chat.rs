//! A model's chat template: from the messages of a conversation to the text of its prompt.
//!
//! Templates are Jinja, in the dialect that Transformers gives them: blocks trimmed, loop controls, Python's methods on
//! strings and maps, `raise_exception`, `strftime_now`, and a `tojson` that writes as Python does.

use crate::error::{Error, Result};
use crate::tokenizer::{SETTINGS_FILE, SpecialToken};
use codecllm_codec::checkpoint::read_file;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The name that errors of the template carry.
const TEMPLATE_NAME: &str = "chat template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of that role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The template of a model that was trained to chat.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token` and the like, by name: templates print them.
    special_tokens: BTreeMap<&'static str, String>,
}

/// The fields of `tokenizer_config.json` that are read here.
#[derive(Deserialize, Default)]
struct Settings {
    chat_template: Option<Templates>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn choose(self) -> Result<String> {
        let named = match self {
            Self::One(template) => return Ok(template),
            Self::Named(named) => named,
        };
        let names = named.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(", ");
        named.into_iter().find(|t| t.name == "default").map(|t| t.template).ok_or_else(|| {
            Error::format(SETTINGS_FILE, format!("no chat template is named `default`; there are: {names}"))
        })
    }
}

impl ChatTemplate {
    /// Reads the template from a model's directory (or from a GGUF file): `chat_template.jinja`, or the one (of several, that named `default`)
    /// in `tokenizer_config.json`.
    pub fn open(dir: &Path) -> Result<Self> {
        let settings: Settings = match read_file(dir, SETTINGS_FILE)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| Error::format(SETTINGS_FILE, e.to_string()))?,
            None => Settings::default(),
        };
        let special_tokens = [
            ("bos_token", settings.bos_token),
            ("eos_token", settings.eos_token),
            ("unk_token", settings.unk_token),
            ("pad_token", settings.pad_token),
        ];
        let special_tokens = special_tokens.into_iter().filter_map(|(name, token)| Some((name, token?.text().into())));
        let source = match (read_file(dir, TEMPLATE_FILE)?, settings.chat_template) {
            (Some(template), _) => template,
            (None, Some(templates)) => templates.choose()?,
            (None, None) => {
                return Err(Error::unsupported(
                    dir.display().to_string(),
                    format!(
                        "this model has no chat template (neither {TEMPLATE_FILE} nor `chat_template` in {SETTINGS_FILE}), \
                         so it was probably not trained to chat; run it without --chat"
                    ),
                ));
            }
        };
        Self::new(&source, special_tokens.collect())
    }

    fn new(source: &str, special_tokens: BTreeMap<&'static str, String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        let source = without_generation_marks(source);
        environment.template_from_named_str(TEMPLATE_NAME, &source).map_err(bad_template)?;
        Ok(Self { environment, source, special_tokens })
    }

    /// The prompt's text for these messages, ending where the assistant's answer begins.
    ///
    /// It has its special tokens spelled out, so encode it without adding any.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let template = self.environment.template_from_named_str(TEMPLATE_NAME, &self.source).map_err(bad_template)?;
        let special_tokens = Value::from_serialize(&self.special_tokens);
        let context = context! {
            messages,
            add_generation_prompt => true,
            tools => Value::from(()),
            documents => Value::from(()),
            ..special_tokens
        };
        template.render(context).map_err(bad_template)
    }
}

fn bad_template(e: minijinja::Error) -> Error {
    Error::format(TEMPLATE_NAME, e.to_string())
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now(`{format}`): {e}")))
}

/// `json.dumps`: characters stay as they are, spaces after commas and colons.
fn to_json(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ensure_ascii == Some(true) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii is not supported"));
    }
    let mut out = Vec::new();
    let written = match indent {
        Some(n) => {
            let indent = " ".repeat(n);
            value.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, SpacedFormatter(CompactFormatter))),
    };
    let bad = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| bad(e.to_string()))?;
    String::from_utf8(out).map(Value::from_safe_string).map_err(|e| bad(e.to_string()))
}

/// One line, with a space after every comma and colon.
struct SpacedFormatter(CompactFormatter);

impl Formatter for SpacedFormatter {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Transformers has a tag of its own, `{% generation %}`, that marks the assistant's part for training. It changes no
/// text, and Jinja does not know it: it becomes `{% if true %}`.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        let Some((tag, after)) = tag.split_once("%}") else { break };
        out.push_str(before);
        out.push_str("{%");
        match tag.trim_matches(|c: char| c == '-' || c.is_whitespace()) {
            mark @ ("generation" | "endgeneration") => {
                let block = if mark == "generation" { "if true" } else { "endif" };
                out.push_str(&tag.replacen(mark, block, 1));
            }
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[(&str, &str)]) -> Result<String> {
        let special = BTreeMap::from([("bos_token", "<s>".to_string()), ("eos_token", "</s>".to_string())]);
        let messages: Vec<_> = messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        ChatTemplate::new(source, special)?.render(&messages)
    }

    /// In the manner of ChatML: loops, trimmed blocks, the generation prompt.
    #[test]
    fn a_turn_template() {
        let source = "{% for message in messages %}\n    {{- '<|' + message['role'] + '|>\\n' + message.content | trim + eos_token }}\n\
                      {% endfor %}\n{% if add_generation_prompt %}\n{{ '<|assistant|>\\n' }}\n{%- endif %}";
        let text = render(source, &[("system", "Be brief."), ("user", " Hi ")]).unwrap();
        assert_eq!(text, "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n");
    }

    #[test]
    fn namespaces_loop_controls_and_string_methods() {
        let source = "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}\
                      {% if m['role'] == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}\
                      {% if m.content.startswith('stop') %}{% break %}{% endif %}\
                      [{{ m.content.strip().upper() }}:{{ m.content.split(' ')[-1] }}:{{ loop.index0 }}]{% endfor %}{{ ns.n }}\
                      {{ messages[1:] | length }}{{ m is defined }}{{ tools is none }}";
        let text = render(source, &[("system", "x"), ("user", "a b"), ("user", "stop"), ("user", "c")]).unwrap();
        assert_eq!(text, "<s>[A B:b:1]23FalseTrue");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let text = render("{{ messages | tojson }}", &[("user", "<a> & 'b' é")]).unwrap();
        assert_eq!(text, r#"[{"role": "user", "content": "<a> & 'b' é"}]"#);
        let text = render("{{ {'a': [1, 2.5, true, none], 'b': {}} | tojson(indent=2) }}", &[]).unwrap();
        assert_eq!(text, "{\n  \"a\": [\n    1,\n    2.5,\n    true,\n    null\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn exceptions_carry_the_template_s_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err().to_string();
        assert!(error.contains("chat template") && error.contains("roles must alternate"), "{error}");
        let error = render("{% for %}", &[]).unwrap_err().to_string();
        assert!(error.contains("chat template"), "{error}");
    }

    #[test]
    fn the_date_has_the_format_asked_for() {
        let year = render("{{ strftime_now('%d %B %Y') }}", &[]).unwrap();
        assert_eq!(year.split(' ').count(), 3, "{year}");
        assert!(year.split(' ').next_back().unwrap().parse::<u32>().unwrap() > 2000, "{year}");
        assert!(render("{{ strftime_now('%!') }}", &[]).is_err());
    }

    #[test]
    fn generation_marks_change_nothing() {
        let source = "{%- for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%} . {% endfor %}";
        assert_eq!(render(source, &[("user", "a"), ("user", "b")]).unwrap(), "a. b. ");
    }

    #[test]
    fn where_templates_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let error = ChatTemplate::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("no chat template") && error.contains("--chat"), "{error}");

        let settings = |json: &str| std::fs::write(dir.path().join(SETTINGS_FILE), json).unwrap();
        let text = || ChatTemplate::open(dir.path()).unwrap().render(&[Message::new("user", "hi")]).unwrap();
        settings(r#"{"bos_token": {"content": "<b>", "lstrip": false}, "chat_template": "{{ bos_token }}1"}"#);
        assert_eq!(text(), "<b>1");
        settings(r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "2"}]}"#);
        assert_eq!(text(), "2");
        settings(r#"{"chat_template": [{"name": "tool_use", "template": "t"}]}"#);
        assert!(ChatTemplate::open(dir.path()).err().unwrap().to_string().contains("tool_use"));
        std::fs::write(dir.path().join(TEMPLATE_FILE), "3{{ messages[0]['content'] }}").unwrap();
        assert_eq!(text(), "3hi");
    }
}
