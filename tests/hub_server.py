"""A stand-in for the Hugging Face hub, in this process on 127.0.0.1, with faults on demand and a log of requests.

A repository is a folder ROOT/{datasets,models}/OWNER/NAME; `Hub.commits` says its commit and `Hub.gated` whether it
asks for the token "hf_good". As the hub does, it sends large files (Parquet and weights) from another host, localhost.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SETTINGS = "DSAM_TESTS_HUB"  # the environment variable that holds those of a command


def settings(url: str, folder: Path, offline: bool = False) -> dict:
    """huggingface_hub's constants, for the hub at `url` and a cache of its own."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    places = {"HF_HUB_CACHE": f"{folder}/hub", "HF_TOKEN_PATH": f"{folder}/token"}
    switches = {"HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_TELEMETRY": True}
    return {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template} | places | switches


def asked_instead() -> None:
    """In a command from the warm process, which has read the usual settings long ago."""
    from huggingface_hub import constants

    for name, value in json.loads(os.environ[SETTINGS]).items():
        setattr(constants, name, value)


LARGE = (".parquet", ".safetensors", ".bin", ".h5")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path):
        self.root, self.commits, self.gated = root, {}, set()
        self.faults: list[dict] = []
        """For requests whose "METHOD PATH" `match` finds, the first `times` of them (default: all): `status` with
        `headers`, `hang` (seconds before the answer), `cut` (close after so many bytes), `flip` (spoil this byte),
        `rate` (bytes a second), `reset` (close at once)."""
        self.log: list[str] = []
        """"STATUS METHOD HOST PATH", then " token" where one came, " from N" where a range was asked for."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def fault(self, what: str) -> dict:
        for fault in self.faults:
            if re.search(fault["match"], what) and fault.get("times", 1) > 0:
                if "times" in fault:
                    fault["times"] -= 1
                return fault
        return {}

    def asked(self, pattern: str = "") -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.where, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.doing = self.server.fault(f"{self.command} {self.where}")
        time.sleep(self.doing.get("hang", 0))
        if self.doing.get("reset"):
            self.note(0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
        elif "status" in self.doing:
            self.send(self.doing["status"], b"told to", self.doing.get("headers", {}))
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.route(query)

    do_HEAD = do_POST = do_GET

    def route(self, query: dict) -> None:
        if match := re.fullmatch(r"/(?:api/resolve-cache|cdn)/(\w+/[^/]+/[^/]+)/(.+)", self.where):
            return self.content(self.server.root / match[1] / match[2])
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/revision/(.+)", self.where):
            if self.allowed(repo := match[1], match[2]):
                files = [p for p in sorted((self.server.root / repo).rglob("*")) if p.is_file()]
                told = {"id": repo.split("/", 1)[1], "sha": self.server.commits[repo], "tags": [], "downloads": 0}
                told["siblings"] = [self.entry(p, self.server.root / repo) for p in files]
                self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
            return None
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/([^/]+)", self.where):  # for huggingface_hub's own use
            if self.allowed(repo := match[1], match[2]):
                files = [p for p in sorted((self.server.root / repo).rglob("*")) if p.is_file()]
                told = [self.entry(p, self.server.root / repo) for p in files]
                told = [{"type": "file", "path": f.pop("rfilename"), "oid": f.pop("blobId")} | f for f in told]
                told = [f | ({"lfs": {**f["lfs"], "oid": f["lfs"]["sha256"]}} if "lfs" in f else {}) for f in told]
                self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
            return None
        if match := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.where):
            repo = f"{'datasets' if match[1] else 'models'}/{match[2]}"
            if self.allowed(repo, match[3]):
                if not (self.server.root / repo / match[4]).is_file():
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                entry = self.entry(self.server.root / repo / match[4], self.server.root / repo)
                name = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
                told = {"X-Repo-Commit": self.server.commits[repo], "X-Linked-Etag": f'"{name}"', "ETag": f'"{name}"'}
                told["X-Linked-Size"] = str(entry["size"])
                if match[4].endswith(LARGE):
                    where = f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{match[4]}"
                    return self.send(302, b"", told | {"Location": where})
                if self.command == "HEAD":  # said at once
                    return self.send(200, b"", told)
                return self.send(307, b"", told | {"Location": f"/api/resolve-cache/{repo}/{match[4]}"})
            return None
        return self.refuse(404, "", "no such page")

    def allowed(self, repo: str, revision: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and not token.startswith("hf_"):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo not in self.server.commits:
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repo in self.server.gated and token != "hf_good":
            self.refuse(403 if token else 401, "GatedRepo", "Access is restricted.")
        elif revision not in ("main", self.server.commits[repo]):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def entry(self, file: Path, folder: Path) -> dict:
        data = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found = {"rfilename": file.relative_to(folder).as_posix(), "size": len(data), "blobId": blob}
        if file.name.endswith(LARGE):
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found

    def content(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        if "flip" in self.doing:
            data[self.doing["flip"]] ^= 255
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first, size = int(match[1]), len(data)
            return self.send(206, bytes(data[first:]), {"Content-Range": f"bytes {first}-{size - 1}/{size}"})
        return self.send(200, bytes(data), {})

    def send(self, status: int, data: bytes, headers: dict) -> None:
        self.note(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = data[: self.doing["cut"]] if "cut" in self.doing else data
        step = max(1, int(self.doing["rate"] / 20)) if "rate" in self.doing else len(sent) or 1
        for start in range(0, len(sent), step):
            self.wfile.write(sent[start : start + step])
            if "rate" in self.doing:
                self.wfile.flush()
                time.sleep(0.05)
        if len(sent) < len(data):
            self.wfile.flush()
            self.close_connection = True

    def note(self, status: int) -> None:
        host = (self.headers.get("Host") or "").split(":")[0]
        line = f"{status} {self.command} {host} {self.where}"
        if self.headers.get("Authorization"):
            line += " token"
        if wanted := self.headers.get("Range"):
            line += f" from {wanted.removeprefix('bytes=').removesuffix('-')}"
        self.server.log.append(line)


# Repositories


def write_parquet(file: Path, columns: dict[str, list], names: list[str] | None) -> None:
    """As `datasets` writes it: int64 labels whose names are noted in the file, or float32 scores."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.float32() if names is None else pyarrow.int64()
    arrays = {n: pyarrow.array(v, kind if n == "label" else pyarrow.string()) for n, v in columns.items()}
    label = {"_type": "Value", "dtype": "float32"} if names is None else {"_type": "ClassLabel", "names": names}
    features = {n: label if n == "label" else {"_type": "Value", "dtype": "string"} for n in columns}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(arrays).replace_schema_metadata(noted), file)


def write_glue(folder: Path) -> None:
    """A few rows of three of GLUE's tasks, in the layout of nyu-mll/glue; the same for RTE as `write_rte`."""
    names = ["entailment", "not_entailment"]
    for split, rows in RTE.items():
        columns = {"sentence1": [r[0] for r in rows], "sentence2": [r[1] for r in rows], "label": [r[2] for r in rows]}
        write_parquet(folder / f"rte/{split}-00000-of-00001.parquet", columns, names)
    for split in ("train", "validation"):
        part = {"sentence": [f"{split} {i}" for i in range(6)], "label": [i % 2 for i in range(6)]}
        for shard in (0, 1):
            half = {n: v[3 * shard : 3 * shard + 3] for n, v in part.items()}
            write_parquet(folder / f"cola/{split}-0000{shard}-of-00002.parquet", half, ["unacceptable", "acceptable"])
        pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [3.8, 0.25]}
        write_parquet(folder / f"stsb/{split}-00000-of-00001.parquet", pairs, None)
    pairs = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [-1, -1]}
    write_parquet(folder / "ax/test-00000-of-00001.parquet", pairs, ["entailment", "neutral", "contradiction"])
    (folder / "README.md").write_text("# GLUE\n")


def write_rte(folder: Path) -> None:
    """The same rows of RTE as GLUE's official files have them."""
    names = ["entailment", "not_entailment"]
    (folder / "RTE").mkdir(parents=True)
    for split, file in (("train", "train"), ("validation", "dev")):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        lines += [f"{i}\t{a}\t{b}\t{names[label]}" for i, (a, b, label) in enumerate(RTE[split])]
        (folder / "RTE" / f"{file}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rte(size: int, label) -> list[tuple[str, str, int]]:
    return [(f'the man number {i} "has" a dog', f"a dog is ’{i % 5}’ of the man", label(i)) for i in range(size)]


RTE = {"train": _rte(24, lambda i: i % 2), "validation": _rte(8, lambda i: i % 2), "test": _rte(3, lambda _: -1)}


def write_bert(folder: Path, vocabulary: Path) -> None:
    """A tiny BERT with all the kinds of files that a repository has."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    config = BertConfig(**sizes, vocab_size=len(words), architectures=["BertModel"])
    weights = BertModel(config).state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(config.to_json_string())
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(vocabulary), do_lower_case=True).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    (folder / "onnx").mkdir()
    for name in ("tf_model.h5", "onnx/model.onnx", "flax_model.msgpack"):
        (folder / name).write_bytes(b"\0" * 1000)
    (folder / "README.md").write_text("# BERT\n")


def write_roberta(folder: Path) -> None:
    """A tiny RoBERTa, whose tokenizer needs two files."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    folder.mkdir(parents=True)
    learnt = ByteLevelBPETokenizer()
    texts = [row[0] for row in RTE["train"]]
    learnt.train_from_iterator(
        texts, vocab_size=300, show_progress=False, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    learnt.save_model(str(folder))
    fast = RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    fast.backend_tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = RobertaConfig(**sizes, vocab_size=learnt.get_vocab_size(), max_position_embeddings=514)
    config.architectures = ["RobertaModel"]
    save_file(RobertaModel(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(config.to_json_string())
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
