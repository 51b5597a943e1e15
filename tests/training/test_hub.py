"""Without the hub a name is told at once, and what is in the cache is still found."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_gradguard.training import hub
from hf_gradguard.training.arguments import DataArguments, ModelArguments
from hf_gradguard.training.pretrained import make_config, make_model
from hf_gradguard.training.text import load_text
from hf_gradguard.training.tokenizer import make_tokenizer, trainable

REMEDY = "give a folder"
TIMEOUT = hub.TIMEOUT
SECONDS = 0.5


@pytest.fixture(autouse=True)
def _nothing_is_known_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process without HF_HUB_OFFLINE, with an empty cache; the settings of the libraries come back."""
    for owner, name, value in (
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
        (hub, "_was_offline", False),
        (hub, "TIMEOUT", SECONDS),
    ):
        monkeypatch.setattr(owner, name, value)
    forget = hub.is_reachable.cache_clear
    forget()
    yield
    forget()


@contextlib.contextmanager
def answering(status: int, seen: list[str]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(f"{self.command} {self.path}")
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """An endpoint that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def closed() -> Iterator[str]:
    """An endpoint that takes no connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


def ask(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> float:
    """Asks for a name that is nowhere; gives how long that took, in seconds."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    started = time.monotonic()
    with pytest.raises(ValueError, match="would have to come from the hub \\(it can't be reached from here\\)"):
        hub.prepare("some/model", "model", REMEDY)
    return time.monotonic() - started


@pytest.mark.parametrize("endpoint", [silent, closed])
def test_an_endpoint_that_does_not_answer_is_given_up_at_once(
    endpoint: contextlib.AbstractContextManager[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint() as url:  # type: ignore[operator]
        # The bound is generous for a slow machine; without care the libraries try for 23 seconds.
        assert ask(monkeypatch, url) < SECONDS + 2


def test_a_resolver_that_hangs_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        is_over.wait(60)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert ask(monkeypatch, "http://hub.invalid") < SECONDS + 2
    is_over.set()


def test_the_time_for_an_answer_is_well_under_five_seconds() -> None:
    assert 0 < TIMEOUT <= 3


def test_the_hub_is_asked_once_for_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    with answering(200, seen) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for name in ("gpt2", "some/model"):
            hub.prepare(name, "model", REMEDY)
            hub.prepare(name, "dataset", REMEDY)
    assert seen == ["HEAD /"]
    assert not constants.HF_HUB_OFFLINE


def test_the_libraries_are_told_and_ask_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed() as url:
        ask(monkeypatch, url)
    assert constants.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    seen: list[str] = []
    with answering(200, seen) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.raises(ValueError, match="would have to come from the hub"):
            hub.prepare("other/model", "model", REMEDY)
    assert seen == []


def test_offline_by_wish_says_so_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_was_offline", True)
    seen: list[str] = []
    with answering(200, seen) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for kind in ("model", "dataset", "tokenizer"):
            with pytest.raises(ValueError, match=f"{kind} 'gpt2' .*HF_HUB_OFFLINE is set") as caught:
                hub.prepare("gpt2", kind, REMEDY)
            assert str(caught.value).endswith(REMEDY)
    assert seen == []


@pytest.mark.parametrize("name", ["./none", "/none", "~/none", "a/b/c", "../none"])
def test_a_path_that_does_not_exist_is_told_and_nothing_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: pytest.fail("asked"))
    with pytest.raises(ValueError, match="there is no folder") as caught:
        hub.prepare(name, "model", REMEDY)
    assert repr(name) in str(caught.value)


def cached(folder: Path, repository: str, kind: str = "models") -> Path:
    """A place in the hub's cache for one snapshot of a repository."""
    base = folder / f"{kind}--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0" * 40)
    return base / "snapshots" / ("0" * 40)


def test_a_model_in_the_cache_is_loaded_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(tmp_path / "hub", "me/tiny")
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=261))
    model.save_pretrained(snapshot)
    trainable.parse("bytes").train([[]], with_marks=False).save_pretrained(snapshot)
    options = ModelArguments(model_name_or_path="me/tiny")
    with silent() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        rows = datasets.Dataset.from_dict({"text": ["a"]})
        tokenizer = make_tokenizer("me/tiny", rows, with_marks=False)
        found = make_model(options, AutoModelForCausalLM, tokenizer)
        assert make_config(options).n_embd == 8
    assert len(tokenizer) == 261
    for name, value in model.state_dict().items():
        assert found.state_dict()[name].equal(value)


@pytest.mark.parametrize("name", ["me/mine", "me/MyReviews", "reviews"])
def test_a_dataset_in_the_cache_is_loaded_without_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / name.split("/")[-1]
    source.mkdir()
    (source / "train.csv").write_text("text\n" + "".join(f"row {index}\n" for index in range(20)))
    made = datasets.load_dataset_builder(str(source))
    made.download_and_prepare()
    # Where it lies after it has come from the hub.
    made_in = Path(made.cache_dir)
    folder = name.replace("MyReviews", "my_reviews").replace("/", "___")
    place = tmp_path / "kept" / folder / "default" / "0.0.0" / ("0" * 40)
    place.parent.mkdir(parents=True)
    shutil.move(made_in, place)
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    with silent() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert len(load_text(DataArguments(dataset_name=name))["train"]) == 19
        with pytest.raises(ValueError, match=r"dataset 'me/other' .* give local files with --train_file"):
            load_text(DataArguments(dataset_name="me/other"))


def test_what_is_cached_in_part_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(tmp_path / "hub", "me/tiny")
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("only this")
    with closed() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.raises(ValueError, match="no model can be loaded from 'me/tiny'"):
            make_config(ModelArguments(model_name_or_path="me/tiny"))
        with pytest.raises(ValueError, match="no tokenizer can be loaded from 'me/tiny'"):
            make_tokenizer("me/tiny", datasets.Dataset.from_dict({"text": ["a"]}), with_marks=False)
