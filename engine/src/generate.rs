//! Generation: from a prompt's tokens to text, one token after another.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::llama::Model;
use crate::sampler::{Sampler, SamplingOptions};
use crate::tokenizer::Tokenizer;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// What to generate and when to stop.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Generation stops before the first of these that the text would contain.
    pub stop: Vec<String>,
    /// Go on past the model's own stop tokens.
    pub ignore_eos: bool,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has as many tokens as were asked for.
    Length,
    /// The model said that the text ends.
    EndOfText,
    /// The text came to one of the stop strings.
    StopString,
    /// The model's context is full.
    Context,
    /// The caller's callback stopped it.
    Interrupted,
}

impl Finish {
    /// The name in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::EndOfText => "end_of_text",
            Self::StopString => "stop_string",
            Self::Context => "context",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The text, without the prompt, the stop token and the stop string.
    pub text: String,
    /// The tokens that were generated, the stop token left out.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub n_prompt_tokens: usize,
    /// Time of the pass over the prompt and of choosing the first token.
    pub prompt_time: Duration,
    /// Time of everything after it.
    pub generate_time: Duration,
    /// Passes over one token, in `generate_time`.
    n_steps: usize,
}

impl Generation {
    /// Tokens of the prompt a second.
    pub fn prompt_tok_per_s(&self) -> f64 {
        self.n_prompt_tokens as f64 / self.prompt_time.as_secs_f64()
    }

    /// Generated tokens a second. The first comes with the prompt and does not count; `None` where it is the only one.
    pub fn generate_tok_per_s(&self) -> Option<f64> {
        (self.n_steps > 0).then(|| self.n_steps as f64 / self.generate_time.as_secs_f64())
    }
}

/// Continues `prompt`. `on_text` is called after every token with the text that became complete, in whole characters
/// and sometimes empty, and may stop the generation; the pieces add up to [`Generation::text`].
///
/// The model's stop tokens are those of its configuration and the tokenizer's own.
///
/// # Errors
/// An empty prompt, a prompt that fills the model's context, an empty stop string, sampling options out of range.
pub fn generate<B: Backend>(
    model: &Model<B>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation> {
    let mut sampler = Sampler::new(options.sampling)?;
    let mut stops = StopStrings::new(&options.stop)?;
    let mut stream = tokenizer.stream(prompt);
    let config = model.config();
    let is_eos = |id| !options.ignore_eos && (config.eos_token_ids.contains(&id) || tokenizer.eos() == Some(id));
    let (max_tokens, finish_at_max) = room(prompt.len(), options.max_tokens, config.max_positions)?;

    let started = Instant::now();
    let mut cache = model.new_cache(prompt.len() + max_tokens)?;
    let is_greedy = sampler.is_greedy();
    let mut next = |tokens: &[u32], history: &[u32]| match is_greedy {
        true => model.likeliest(tokens, &mut cache),
        false => model.sample(tokens, &mut cache, &sampler.draw(history)),
    };
    let mut id = next(prompt, prompt)?;
    let prompt_time = started.elapsed();

    let started = Instant::now();
    let mut history = prompt.to_vec();
    let end = prompt.len() + max_tokens;
    let mut text = String::new();
    let mut emit = |piece: &str| {
        text.push_str(piece);
        on_text(piece)
    };
    let mut n_steps = 0;
    let mut finish = loop {
        if history.len() == end {
            break finish_at_max;
        }
        if history.len() > prompt.len() {
            id = next(&[id], &history)?;
            n_steps += 1;
        }
        if is_eos(id) {
            break Finish::EndOfText;
        }
        history.push(id);
        let (piece, is_stopped) = stops.push(&stream.push(id)?);
        let flow = emit(&piece);
        if is_stopped {
            break Finish::StopString;
        }
        if flow.is_break() {
            break Finish::Interrupted;
        }
    };
    // What was held back in case it became a character or a stop string.
    if finish != Finish::StopString {
        let (mut rest, is_stopped) = stops.push(&stream.finish()?);
        if is_stopped {
            finish = Finish::StopString;
        } else {
            rest += &stops.finish();
        }
        // The generation is over: there is nothing left to stop.
        let _ = emit(&rest);
    }
    let tokens = history.split_off(prompt.len());
    let generate_time = started.elapsed();
    Ok(Generation { text, tokens, finish, n_prompt_tokens: prompt.len(), prompt_time, generate_time, n_steps })
}

/// How many tokens may follow the prompt, and why no more.
fn room(n_prompt: usize, max_tokens: usize, max_positions: usize) -> Result<(usize, Finish)> {
    if n_prompt == 0 {
        return Err(Error::Parameter(
            "the prompt is empty, and the tokenizer has no token that begins a text; give a prompt".into(),
        ));
    }
    if n_prompt + max_tokens.min(1) > max_positions {
        return Err(Error::Context { what: "the model's context", limit: max_positions, wanted: n_prompt + 1 });
    }
    let room = max_positions - n_prompt;
    Ok(if max_tokens <= room { (max_tokens, Finish::Length) } else { (room, Finish::Context) })
}

/// Holds text back while it may be the beginning of a stop string.
struct StopStrings<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> StopStrings<'a> {
    fn new(stops: &'a [String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Parameter("a stop string is empty; it would stop every text at once".into()));
        }
        Ok(Self { stops, held: String::new() })
    }

    /// Takes text and returns what cannot belong to a stop string, and whether one was reached. What follows it is lost.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let may_begin_one = |rest: &str| self.stops.iter().any(|stop| stop.starts_with(rest));
        let n_free = self.held.char_indices().map(|(i, _)| i).find(|i| may_begin_one(&self.held[*i..]));
        let kept = self.held.split_off(n_free.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// The text that no stop string came of.
    fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_hold_back_no_more_than_they_must() {
        let stops = ["END".to_string(), "\n\n".to_string()];
        let mut held = StopStrings::new(&stops).unwrap();
        assert_eq!(held.push("one E"), ("one ".into(), false));
        assert_eq!(held.push("N"), ("".into(), false));
        assert_eq!(held.push("Xé\n"), ("ENXé".into(), false));
        assert_eq!(held.push("E"), ("\n".into(), false));
        assert_eq!(held.push("ND of"), ("".into(), true));

        let mut held = StopStrings::new(&stops).unwrap();
        assert_eq!(held.push("a EN"), ("a ".into(), false));
        assert_eq!(held.finish(), "EN");
        let mut held = StopStrings::new(&stops).unwrap();
        assert_eq!(held.push("late\n\nEND"), ("late".into(), true));
        assert!(StopStrings::new(&[String::new()]).is_err());
    }

    #[test]
    fn the_context_bounds_a_generation() {
        assert_eq!(room(5, 10, 100).unwrap(), (10, Finish::Length));
        assert_eq!(room(95, 10, 100).unwrap(), (5, Finish::Context));
        assert_eq!(room(100, 0, 100).unwrap(), (0, Finish::Length));
        assert!(matches!(room(100, 1, 100), Err(Error::Context { limit: 100, wanted: 101, .. })));
        assert!(room(0, 1, 100).is_err());
    }
}
