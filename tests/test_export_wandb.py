"""Any run comes back as one W&B run from its files alone; W&B out of reach costs a run nothing but a line."""

import gzip
import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import warm
import yaml
from conftest import ROOT, command, start
from wandb_file import records

from dsam.config import CONF, Config
from dsam.errors import UserError
from dsam.overrides import compose_config
from dsam.runs import export as export_of
from dsam.runs.tracking import PATIENCE, Tracker, flat

pytestmark = pytest.mark.slow

KEY = {"WANDB_API_KEY": "0" * 40}
LONG = ["train.max_steps=120", "checkpoint.every_seconds=0.1"]
SETTINGS = ("SILENT", "MODE", "API_KEY", "BASE_URL", "ENTITY", "PROJECT", "DIR")


@pytest.fixture(autouse=True)
def no_wandb_settings(monkeypatch, tmp_path):
    """Of the machine: neither its login nor its variables."""
    for name in SETTINGS:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def export(*arguments, **options):
    return command(*map(str, arguments), script="export_wandb.py", **options)


def run_folder(runs):
    (folder,) = runs.glob("*/*/*/*")
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def as_wandb_has_it(line):
    loss = "evaluation/loss" if line["event"] == "evaluation" else "loss"  # two series, and not one that jumps
    return {loss if k == "loss" else k: v for k, v in flat(line).items() if k != "event"}


class Back:
    """What a .wandb file says."""

    def __init__(self, file):
        found = {}
        for record in records(file):
            found.setdefault(record.WhichOneof("record_type"), []).append(record)
        self.run = found["run"][0].run
        self.config = {u.key: json.loads(u.value_json) for u in self.run.config.update}
        self.rows = [self._values(r.history.item) for r in found.get("history", [])]
        self.history = [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.rows]
        self.summary = {k: v for r in found.get("summary", []) for k, v in self._values(r.summary.update).items()}
        self.exit_code = found["exit"][0].exit.exit_code
        self.step_metrics = {m.metric.name or m.metric.glob_name: m.metric.step_metric for m in found.get("metric", [])}

    @staticmethod
    def _values(items):
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def exported(into, folder):
    """The one W&B run that was exported of the run in `folder`."""
    (file,) = into.glob(f"wandb/offline-run-*-{folder.name}/run-{folder.name}.wandb")
    return Back(file)


def check_all_is_there(back, folder):
    assert back.run.run_id == folder.name
    assert back.history == [as_wandb_has_it(line) for line in lines(folder)]
    assert [row["_step"] for row in back.rows] == list(range(len(lines(folder))))
    assert back.step_metrics["*"] == "step"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    identity = json.loads((folder / "provenance.json").read_text())["identity"]
    assert {k: v for k, v in back.config.items() if k != "_wandb"} == config | {"identity": identity}
    if (folder / "result.json").exists():
        result = flat(json.loads((folder / "result.json").read_text()))
        assert {k: v for k, v in back.summary.items() if k in result} == result
        assert back.exit_code == 0
    else:
        assert back.exit_code == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished offline run; tests that change it take a copy."""
    tmp = tmp_path_factory.mktemp("finished")
    done = command("train.max_steps=20", "tracking=offline", f"paths.runs={tmp}/runs", f"paths.cache={tmp}/cache")
    assert done.returncode == 0, done.stderr
    return tmp / "runs"


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    return run_folder(tmp_path / "runs")


def killed(runs, until, *arguments, **env):
    """Starts a long run and kills it once it has some lines and `until` holds; returns its folder."""
    process = start(*LONG, *arguments, env=env)
    end = time.monotonic() + 120
    while not ([p for p in runs.glob("*/*/*/*/metrics.jsonl") if p.read_bytes().count(b"\n") >= 3] and until()):
        assert time.monotonic() < end and process.poll() is None, "nothing to kill"
        time.sleep(0.02)
    process.kill()
    process.wait()
    return run_folder(runs)


def test_history_config_identity_and_summary_are_those_of_the_files(copy, tmp_path):
    others = dict.fromkeys(
        ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP"), "other"
    )
    done = export(f"paths.runs={tmp_path}/runs", "--into", tmp_path / "out", env=others)
    assert done.returncode == 0, done.stderr
    run = exported(tmp_path / "out", copy).run
    assert (run.project, run.display_name, run.run_group) == ("dsam", "agreement-tiny-adamw-0", "")
    assert f"1/1 {copy}: {len(lines(copy))} lines to {tmp_path}/out/wandb/offline-run-" in done.stdout
    check_all_is_there(exported(tmp_path / "out", copy), copy)
    assert os.listdir(tmp_path / "out") == ["wandb"]


def test_the_export_of_a_run_equals_what_it_logged_itself(copy, tmp_path):
    assert export(copy, "--into", tmp_path / "out").returncode == 0
    (file,) = copy.glob("wandb/offline-run-*/run-*.wandb")
    own, again = Back(file), exported(tmp_path / "out", copy)
    for name in ("history", "config", "step_metrics", "exit_code"):
        assert getattr(own, name) == getattr(again, name)
    result = flat(json.loads((copy / "result.json").read_text()))
    result.pop("result_sha256")  # of the file
    assert own.summary.items() >= result.items()
    for name in ("run_id", "display_name", "run_group", "job_type", "project"):
        assert getattr(own.run, name) == getattr(again.run, name)


def test_of_one_run_under_two_names_one_is_exported_and_that_is_said(paths, tmp_path):
    short = ["train.max_steps=2", "tracking=disabled", *paths]
    for method in (["optimizer=adamw"], ["optimizer=adamw_2x", "optimizer.steps_factor=1"]):
        assert command("task=agreement", *method, *short).returncode == 0
    one, other = sorted((tmp_path / "runs").glob("*/*/*/*"))
    assert one.name == other.name
    done = export(one, other, "--into", tmp_path / "out")
    assert f"2/2 {other}: the same settings by other names as {one}, which stands for both\n" in done.stdout
    assert "2 runs: 1 exported, 1 unchanged, 0 failed" in done.stdout
    assert exported(tmp_path / "out", one).run.run_id == one.name


def test_a_killed_run_is_exported_as_far_as_it_came_and_a_resumed_one_as_one_run(paths, tmp_path):
    runs = tmp_path / "runs"
    folder = killed(runs, lambda: list(runs.glob("**/run-*.wandb")), "tracking=offline", *paths)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "train", "st')  # what a kill may leave
    so_far = (folder / "metrics.jsonl").read_text().count("\n")
    assert export(folder, "--into", tmp_path / "out").returncode == 0
    back = exported(tmp_path / "out", folder)
    assert len(back.history) == so_far and back.exit_code == 1

    assert command(*LONG, "tracking=offline", *paths).returncode == 0
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    assert export(folder, "--into", tmp_path / "out").returncode == 0
    back = exported(tmp_path / "out", folder)  # one: the new export took the older one's place
    check_all_is_there(back, folder)
    assert len(back.history) > so_far
    steps = [line["step"] for line in lines(folder) if line["event"] == "train"]
    assert steps == list(range(10, 121, 10))


def test_a_broken_wandb_folder_loses_nothing(copy, tmp_path):
    (file,) = copy.glob("wandb/offline-run-*/run-*.wandb")
    file.write_bytes(file.read_bytes()[:100] + b"\0garbage")
    assert export(copy, "--into", tmp_path / "out").returncode == 0
    check_all_is_there(exported(tmp_path / "out", copy), copy)
    shutil.rmtree(copy / "wandb")
    assert export(copy, "--into", tmp_path / "out").returncode == 0
    check_all_is_there(exported(tmp_path / "out", copy), copy)


def test_a_sweep_s_runs_with_fresh_seeds_and_one_of_no_experiment_are_found_by_name(copy, tmp_path):
    runs = copy.parents[3]
    (runs / ".sweeps").mkdir(exist_ok=True)
    for name in ("label_noise_chosen", "sweep"):
        listed = {"runs": [{"folder": str(copy.relative_to(runs))}, {"folder": "a/b/c/d"}]}
        (runs / ".sweeps" / f"{name}.json").write_text(json.dumps(listed))
        assert export_of.choose([f"experiment={name}", f"paths.runs={runs}"]) == ([copy], runs)
    for setting in ("task=rte", "optimizer=sam", "tracking.entity=team"):
        with pytest.raises(UserError, match=rf"^{setting} has no effect on runs that are there"):
            export_of.choose([f"paths.runs={runs}", setting])


def test_what_went_to_one_owner_has_not_gone_to_another(copy, monkeypatch):
    run = export_of.read(copy)
    monkeypatch.setenv("WANDB_ENTITY", "alice")
    export_of.remember(run, "https://wandb.example")
    assert export_of.uploaded(run, "https://wandb.example")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    assert not export_of.uploaded(run, "https://wandb.example")
    mark = json.loads((copy / export_of.SYNCED).read_text())
    del mark["owner"]  # as an earlier version noted it, which did not know
    (copy / export_of.SYNCED).write_text(json.dumps(mark))
    assert export_of.uploaded(run, "https://wandb.example")


def test_a_damaged_run_is_named_and_the_others_are_exported(copy, tmp_path):
    other = copy.with_name("0" * 16)
    shutil.copytree(copy, other, symlinks=True)
    (other / "config.yaml").write_text("task: [")
    done = export(f"paths.runs={tmp_path}/runs", "--into", tmp_path / "out")
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"failed: {other}: config.yaml cannot be read")
    check_all_is_there(exported(tmp_path / "out", copy), copy)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["experiment=smok"], "unknown experiment 'smok'; did you mean 'smoke'?"),
        (["experiment=smoke", "paths.runs=nowhere"], "no sweep 'smoke' under 'nowhere'"),
        (["paths.runs=nowhere"], "no runs at 'nowhere'"),
        (["nowhere"], "'nowhere' is no run folder"),
        (["--mode", "cloud"], "invalid choice: 'cloud'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
    done = export(*arguments)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ") and message in error


class Server(ThreadingHTTPServer):
    """As much of a W&B server as wandb needs: runs by id, each with the lines of its history."""

    def __init__(self, refuse_lines=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.history, self.ended, self.requests, self.refuse_lines = {}, {}, 0, refuse_lines
        self.going_on, self.deleted = set(), set()  # runs whose lines are asked for before more come; and gone ones

    def handle_error(self, *_):
        pass  # a client that was killed

    def rows(self, run_id):
        rows = [json.loads(line) for _, line in sorted(self.history[run_id].items())]
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_PUT(self):
        self._body()
        self._answer({})

    do_GET = do_PUT

    def do_POST(self):
        self.server.requests += 1
        body = self._body()
        if self.path == "/graphql":
            data = self._graphql(json.loads(body))
            self._answer(
                {"data": data} if data is not None else {"errors": [{"message": "deleted"}]}, 409 * (not data) or 200
            )
        elif self.path.endswith("/file_stream"):
            if self.server.refuse_lines:
                self._answer({"error": "refused"}, 400)
                return
            self._stream(self.path.split("/")[-2], json.loads(body))
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._answer({})

    def _body(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, contents, status=200):
        data = json.dumps(contents).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _graphql(self, request):
        query, given = request["query"], request.get("variables") or {}
        project = {"id": "p", "name": "dsam", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query:
            history = self.server.history.get(given["name"])
            self.server.going_on.add(given["name"])
            bucket = history is not None and {
                "id": "r", "name": given["name"], "displayName": "", "summaryMetrics": "{}", "config": "{}",
                "logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(history), "eventsTail": "[]",
                "historyTail": json.dumps([history[max(history)]] if history else []), "tags": [], "notes": "",
                "wandbConfig": '{"t": {}}',
            }  # fmt: skip
            return {"model": project | {"bucket": bucket or None}}
        if "upsertBucket" in query:
            if given["name"] in self.server.deleted:
                return None
            self.server.history.setdefault(given["name"], {})
            bucket = {"id": "r", "name": given["name"], "displayName": "", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _stream(self, run_id, given):
        part = (given.get("files") or {}).get("wandb-history.jsonl")
        if part:
            for i, line in enumerate(part["content"], part["offset"]):
                known = run_id in self.server.going_on and i in self.server.history[run_id]
                assert not known, "a line of the history written over"
                self.server.history[run_id][i] = line
        if given.get("complete"):
            self.server.ended[run_id] = given["exitcode"]
            self.server.going_on.discard(run_id)


@contextmanager
def serving(**options):
    server = Server(**options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_an_upload_is_whole_and_is_not_repeated_until_something_changes(copy):
    with serving() as server:
        env = KEY | {"WANDB_BASE_URL": server.url}
        first = export("--mode", "online", copy, env=env)
        assert first.returncode == 0, first.stderr
        assert server.rows(copy.name) == [as_wandb_has_it(line) for line in lines(copy)]
        assert server.ended == {copy.name: 0}
        requests = server.requests
        second = export("--mode", "online", copy, env=env)
        assert second.returncode == 0 and "uploaded before, unchanged" in second.stdout
        assert server.requests == requests
        with (copy / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"event": "train", "step": 99, "loss": 1.0}) + "\n")
        assert export("--mode", "online", copy, env=env).returncode == 0
        assert server.rows(copy.name) == [as_wandb_has_it(line) for line in lines(copy)]


def test_a_run_done_anew_takes_the_place_of_the_old_one(copy):
    """Its method was mended, say, and its folder removed: the identity holds no source code."""
    with serving() as server:
        env = KEY | {"WANDB_BASE_URL": server.url}
        assert export("--mode", "online", copy, env=env).returncode == 0
        anew = [line | ({"loss": line["loss"] + 1} if "loss" in line else {}) for line in lines(copy)]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in anew))
        done = export("--mode", "online", copy, env=env)
        assert done.returncode == 0 and "lines uploaded" in done.stdout
        assert server.rows(copy.name) == [as_wandb_has_it(line) for line in anew]


def test_a_run_that_the_server_will_not_have_keeps_no_other_from_it(copy, tmp_path):
    others = [copy.parent / f"{copy.name[:-1]}{last}" for last in "xy"]
    for other in others:
        shutil.copytree(copy, other)
        (other / "result.json").unlink()  # which names its run
    with serving() as server:
        server.deleted.add(others[0].name)
        done = export("--mode", "online", others[0], copy, others[1], env=KEY | {"WANDB_BASE_URL": server.url})
        assert done.returncode == 1 and "3 runs: 2 exported, 0 unchanged, 1 failed" in done.stdout
        (error,) = done.stderr.splitlines()
        assert error.startswith(f"failed: {others[0]}: W&B refuses it: ")
        assert server.history.keys() == {copy.name, others[1].name}
        server.deleted |= {copy.name, others[1].name}  # all: another account's, say
        for folder in (copy, *others):
            (folder / "wandb-sync.json").unlink(missing_ok=True)
        done = export("--mode", "online", copy, *others, env=KEY | {"WANDB_BASE_URL": server.url})
        assert done.returncode == 1 and done.stderr.startswith(f"error: W&B at {server.url}: ")


def test_an_online_run_killed_and_resumed_is_one_run_with_each_line_once(paths, tmp_path):
    runs = tmp_path / "runs"
    folder = killed(runs, lambda: True, "tracking=disabled", *paths)
    so_far = lines(folder)
    with serving() as server:
        env = KEY | {"WANDB_BASE_URL": server.url}
        # The server got every line before the kill, also those after the checkpoint, which are written again.
        history = [json.dumps(as_wandb_has_it(line) | {"_step": i}) for i, line in enumerate(so_far)]
        server.history[folder.name] = dict(enumerate(history))
        done = command(*LONG, "tracking=online", *paths, env=env)
        assert done.returncode == 0 and "W&B" not in done.stderr
        done = export("--mode", "online", folder, env=env)
        assert done.returncode == 0, done.stderr
    assert len(lines(folder)) > len(so_far)
    found = [(row["step"], "score" in row) for row in server.rows(folder.name)]
    assert found == [(line["step"], line["event"] == "evaluation") for line in lines(folder)]
    assert server.ended == {folder.name: 0}


def test_an_upload_that_the_server_refuses_is_not_remembered(copy):
    with serving(refuse_lines=True) as server:
        done = export("--mode", "online", copy, env=KEY | {"WANDB_BASE_URL": server.url})
    assert done.returncode == 1, done.stdout
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"failed: {copy}: ") and "400" in error
    assert not (copy / "wandb-sync.json").exists()


def test_without_login_or_network_the_upload_ends_soon_with_one_line(copy):
    done = export("--mode", "online", copy, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: no login to W&B: run `wandb login` or set WANDB_API_KEY\n"
    done = export("--mode", "online", copy, env=KEY | {"WANDB_BASE_URL": "http://127.0.0.1:9"}, timeout=120)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: W&B at http://127.0.0.1:9: ") and "connection refused" in error


def test_a_run_whose_wandb_is_out_of_reach_ends_well(paths, tmp_path):
    env = KEY | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = command("train.max_steps=20", "tracking=online", *paths, env=env)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if "W&B" in line]
    assert "the run goes on without it" in line
    assert (run_folder(tmp_path / "runs") / "result.json").exists()


def track(folder, url, lines=50):
    """Begins a tracked run; what this returns waits for its end, and returns the seconds that the run took, and that
    W&B's end took after it, and what was said."""
    process = warm.Command(
        "test_export_wandb:tracked", [str(folder), lines], ROOT, os.environ | KEY | {"WANDB_BASE_URL": url}
    )

    def ended():
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        inside, whole = json.loads(said)
        return inside, whole - inside, errors

    return ended


def tracked(folder, lines):
    """What a process of its own does for `track`."""
    config = Config.load(compose_config(["tracking=online"], CONF))
    started = time.monotonic()
    with Tracker(config, "abc", Path(folder), {}) as tracker:
        for step in range(lines):
            tracker.log({"event": "train", "step": step, "loss": 0.5})
            time.sleep(0.01)
        tracker.summary({"status": "finished"})
        inside = time.monotonic() - started
    print(json.dumps([inside, time.monotonic() - started]))


def test_a_server_that_refuses_never_answers_or_goes_away_costs_a_run_seconds_at_its_end(tmp_path):
    # The runs sleep for 0.5 or 5 s; the rest is room for a busy machine.
    with socket.create_server(("127.0.0.1", 0)) as silent, serving() as server:
        refused = track(tmp_path / "refused", "http://127.0.0.1:9")
        unanswered = track(tmp_path / "unanswered", f"http://127.0.0.1:{silent.getsockname()[1]}")
        left = track(tmp_path / "left", server.url, lines=500)
        wait_for(lambda: server.history)
        stop(server)
        for ended, most in ((refused, 5), (unanswered, 5), (left, 15)):
            inside, end, said = ended()
            assert inside < most and end < PATIENCE["online"] + 4 and "goes on without it" in said


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def stop(server):
    server.shutdown()
    server.server_close()
