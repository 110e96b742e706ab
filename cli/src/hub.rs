//! Finds a checkpoint: a directory or a GGUF file of this machine, or a repository of the Hugging Face Hub through its cache.

use crate::output::Error;
use codecllm_codec::Checkpoint;
use codecllm_codec::archive::is_companion;
use codecllm_codec::checkpoint::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};

/// The revision of a repository where the user names none.
pub const DEFAULT_REVISION: &str = "main";

/// The directory of a checkpoint that the user names by path or by repository id; downloads what the cache lacks.
///
/// # Errors
/// Neither a directory nor a repository id; a repository that cannot be reached or read.
pub fn resolve(name: &str, revision: &str) -> Result<PathBuf, Error> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.into());
    }
    if !is_repository_id(name) {
        return Err(usage(format!(
            "{name}: no such directory or file; give a directory that holds a checkpoint, a GGUF file, or a Hugging Face \
             repository id (OWNER/NAME)"
        )));
    }
    download(name, revision).or_else(|problem| match problem {
        Problem::Unreachable(e) => match cached(name, revision) {
            Some(dir) => {
                eprintln!("note: the Hugging Face Hub cannot be reached ({e}); using the cached {}", dir.display());
                Ok(dir)
            }
            None => Err(format!(
                "there is no directory {name} here, and the Hugging Face Hub cannot be reached to look for such a \
                 repository: {e}\nPass a directory, or download the model where there is a network (`hf download {name} \
                 --local-dir DIR`) and pass a copy of DIR."
            )
            .into()),
        },
        Problem::Other(e) => Err(e),
    })
}

fn usage(problem: String) -> Error {
    codecllm_codec::Error::Parameter(problem).into()
}

/// Whether `name`, which is no existing path, reads `OWNER/NAME` rather than like a path.
fn is_repository_id(name: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.starts_with(['.', '-', '~'])
            && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    name.split_once('/').is_some_and(|(owner, repository)| {
        is_word(owner)
            && is_word(repository)
            && !Path::new(owner).is_dir()
            && !repository.ends_with(".safetensors")
            && !repository.ends_with(".gguf")
    })
}

enum Problem {
    Unreachable(String),
    Other(Error),
}

fn repository(id: &str, revision: &str) -> Repo {
    Repo::with_revision(id.into(), RepoType::Model, revision.into())
}

/// A complete checkpoint in the cache.
fn cached(id: &str, revision: &str) -> Option<PathBuf> {
    let files = Cache::from_env().repo(repository(id, revision));
    let found = files.get(SINGLE_FILE).or_else(|| files.get(INDEX_FILE))?;
    let dir = found.parent()?.to_path_buf();
    Checkpoint::open(&dir).is_ok().then_some(dir)
}

fn download(id: &str, revision: &str) -> Result<PathBuf, Problem> {
    let explain = |e: ApiError| explain(id, revision, e);
    let token = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()).or_else(|| Cache::from_env().token());
    let api = ApiBuilder::from_env().with_token(token).build().map_err(explain)?;
    let files = api.repo(repository(id, revision));
    let names: Vec<String> = files.info().map_err(explain)?.siblings.into_iter().map(|s| s.rfilename).collect();
    let has = |name: &str| names.iter().any(|n| n == name);

    let mut wanted: Vec<&str> =
        names.iter().map(String::as_str).filter(|n| !n.contains('/') && is_companion(n)).collect();
    wanted.extend([CONFIG_FILE].iter().filter(|n| has(n)));
    let weights: Vec<String> = if has(SINGLE_FILE) {
        vec![SINGLE_FILE.into()]
    } else if has(INDEX_FILE) {
        let mut weights = shards(&files, explain)?;
        weights.push(INDEX_FILE.into());
        weights
    } else {
        return Err(Problem::Other(
            format!(
                "{id} has neither {SINGLE_FILE} nor {INDEX_FILE}; look for a repository with safetensors, or download a GGUF \
                 file and give its path"
            )
            .into(),
        ));
    };
    wanted.extend(weights.iter().map(String::as_str));
    let mut dir = PathBuf::new();
    for name in wanted {
        let path = files.get(name).map_err(explain)?;
        dir = path.parent().map(Path::to_path_buf).unwrap_or_default();
    }
    Ok(dir)
}

/// The weight files that the repository's index names.
fn shards(files: &ApiRepo, explain: impl Fn(ApiError) -> Problem) -> Result<Vec<String>, Problem> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = files.get(INDEX_FILE).map_err(explain)?;
    let read = || -> Result<Index, Error> { Ok(serde_json::from_slice(&std::fs::read(&path)?)?) };
    let index = read().map_err(|e| Problem::Other(format!("{}: {e}", path.display()).into()))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    Ok(shards)
}

fn explain(id: &str, revision: &str, error: ApiError) -> Problem {
    let text = error.to_string();
    let other = |problem: String| Problem::Other(problem.into());
    match error {
        ApiError::RequestError(e) => match (*e).into_response().map(|r| r.status()) {
            None => Problem::Unreachable(text),
            Some(401 | 403) => other(format!(
                "the Hugging Face Hub lets nobody read {id} without permission: it does not exist, is private, or asks \
                 to accept its terms; set HF_TOKEN, or run `hf auth login` ({text})"
            )),
            Some(404) => other(format!(
                "{id} is neither a directory here nor a repository of the Hugging Face Hub with the revision {revision}"
            )),
            Some(_) => other(format!("the Hugging Face Hub refused {id}: {text}; try again later")),
        },
        ApiError::IoError(_) => Problem::Unreachable(text),
        _ => other(format!("downloading {id}: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_ids_are_told_from_paths() {
        for id in ["TinyLlama/TinyLlama-1.1B-Chat-v1.0", "meta-llama/Llama-3.2-1B"] {
            assert!(is_repository_id(id), "{id}");
        }
        for path in
            ["./a/b", "../model", "/abs/olute", "~/model", "a/b/c", "model", "dir/", "x/model.safetensors", "src/model"]
        {
            assert!(!is_repository_id(path), "{path}");
        }
    }
}
