"""Uploading an exported folder to the Hugging Face Hub, which happens where it is asked for alone.

The token is that of the environment (HF_TOKEN) or of `hf auth login`: huggingface_hub reads it, and it is written
nowhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import ConfigError, LdmError, ResourceError
from ldm.interop.exports.usage import optional_packages

WRITTEN = ("config.json", "model_index.json", "programs.json", "adapter_config.json", "configs/config.yaml")
"""Of an exported folder it has at least one: of a model, a pipeline, programs, an adapter, a run."""


def check(repo: str) -> None:
    """Before anything is loaded or written.

    Raises:
        ConfigError: the hub's package is missing, or no repository can have that name.
    """
    with optional_packages("--push"):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: cannot be the name of a repository: {_line(error)}") from error


def check_folder(folder: Path) -> None:
    """ConfigError unless `ldm export` has written it: all that is in it will be uploaded."""
    # The card may have been edited.
    if not (folder / "README.md").is_file() or not any((folder / name).is_file() for name in WRITTEN):
        raise ConfigError(
            f"{folder}: is no exported folder (expected README.md and one of {', '.join(WRITTEN)}); to write one from "
            "a run, give --to and --out"
        )


def announced(repo: str, private: bool) -> str:
    """What is about to happen, and who will see it."""
    from huggingface_hub import HfApi

    seen = "only you and those you let in can read it" if private else "EVERYONE can read it (--private: not)"
    return f"uploading this folder to {HfApi().endpoint}/{repo}, where {seen}"


def upload(folder: Path, repo: str, private: bool) -> str:
    """Create the repository, if there is none, and upload the folder as one commit; its address.

    Raises:
        ConfigError: it should be private, and is there already and public; nothing is uploaded.
        ResourceError: the hub refused it or could not be reached; what to do. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _repeatable(folder, repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(
                f"--push {repo} --private: the repository is there already, and public; nothing was uploaded. Make it "
                f"private in its settings, or name another"
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by ldm")
    return str(url)


@contextmanager
def _repeatable(folder: Path, repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    again = f"{folder} is whole and stays. Once that is solved: ldm export {folder} --push {repo}"
    try:
        yield
    except LdmError:
        raise
    except LocalTokenNotFoundError as error:
        raise ResourceError(f"--push {repo}: not logged in: run `hf auth login`, or set HF_TOKEN. {again}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        login = " (not logged in, or no right to write there: `hf auth login`)" if code in (401, 403) else ""
        raise ResourceError(f"--push {repo}: the hub answered {code}{login}: {_line(error)} {again}") from error
    except Exception as error:  # huggingface_hub's versions have several transports, each with errors of its own
        problem = f"could not be uploaded ({type(error).__name__}: {_line(error)})"
        raise ResourceError(f"--push {repo}: {problem} {again}") from error


def _line(error: Exception) -> str:
    """The first line of a message, as a sentence."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
