"""Names on the hub, and what to say when it does not answer."""

import os
import re
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from utils.errors import UsageError, one_line

# The hub moved these under their owners; the short names are those of the original commands.
CANONICAL_MODELS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "openai-gpt": "openai-community/openai-gpt",
    "distilgpt2": "distilbert/distilgpt2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "bert-base-chinese": "google-bert/bert-base-chinese",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "distilroberta-base": "distilbert/distilroberta-base",
    "albert-base-v2": "albert/albert-base-v2",
    "xlnet-base-cased": "xlnet/xlnet-base-cased",
    "xlnet-large-cased": "xlnet/xlnet-large-cased",
}
CANONICAL_DATASETS = {"wikitext": "Salesforce/wikitext"}


def use_cache_if_unreachable(names: list[str | None]) -> list[str]:
    """Switches the hub's libraries to their caches if one of `names` may be there and the hub's host does not answer.

    They would try again and again, 23 seconds for each request and 46 for a tokenizer, before they look into the cache.
    To be called before `datasets` is imported. Returns a note for the log if it switched. A proxy is left to do its work.
    """
    from huggingface_hub import constants

    wanted = [name for name in names if name and not os.path.exists(name)]
    if not wanted or constants.HF_HUB_OFFLINE or getproxies():
        return []
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        return [
            f"the hub at {_shown(constants.ENDPOINT)} does not answer ({error}): taking {', '.join(wanted)} from the cache"
        ]
    return []


def _shown(endpoint: str) -> str:
    """A mirror's address without the password that it may hold."""
    return re.sub(r"//[^/@]*@", "//***@", endpoint)


def dataset_name(name: str) -> str:
    """The hub's present name of a dataset: `datasets` refuses short ones, although the hub redirects them."""
    if "/" in name or name in CANONICAL_DATASETS:
        return CANONICAL_DATASETS.get(name, name)
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name).id


_NOT_THERE = ("RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "EntryNotFoundError")
_UNREACHABLE = (
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "ReadTimeout",
    "HfHubHTTPError",
    "MaxRetryError",
)


def explain(error: Exception, flag: str, name: str) -> UsageError:
    """One line for an error while `name`, given by `flag`, was loaded from the hub or from a folder."""
    chain: BaseException | None = error
    seen: list[BaseException] = []
    while chain is not None and chain not in seen:
        seen.append(chain)
        chain = chain.__cause__ or chain.__context__
    kinds = [type(e).__name__ for e in seen]
    if any(kind == "GatedRepoError" for kind in kinds):
        return UsageError(
            f"{flag} {name}: access is by permission; ask for it on the hub, then give --token or `hf auth login`"
        )
    unreachable = any(kind in _UNREACHABLE for kind in kinds) or any(
        words in one_line(error) for words in ("couldn't connect", "LocalEntryNotFoundError", "OfflineModeIsEnabled")
    )
    if any(kind in _NOT_THERE for kind in kinds):
        return UsageError(
            f"{flag} {name}: neither a folder here nor a repository on the hub that you may read; check the name"
        )
    if unreachable:
        endpoint = _shown(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        return UsageError(
            f"{flag} {name}: the hub at {endpoint} cannot be reached and the offline cache (HF_HOME) does not hold it; set "
            "HF_ENDPOINT to a mirror, or take it from ModelScope by --hub modelscope, or copy a cache (HF_HOME) that holds it "
            "from a machine with a network, or name a local folder, or give local text by --train_file"
        )
    return UsageError(f"{flag} {name}: cannot be loaded: {one_line(error)[:300]}")
