"""A command from the warm process is what a fresh interpreter makes of it, as far as the command itself can tell."""

import json
import signal

import pytest
from conftest import start

pytestmark = pytest.mark.slow

LOOKS = """
import json, os, signal, sys, threading
signals = {int(s): str(signal.getsignal(s)).split(" at ")[0] for s in signal.valid_signals()}
streams = [sys.stdin, sys.stdout, sys.stderr]
streams = [[s.fileno(), s.isatty(), s.encoding, s.errors, s.line_buffering] for s in streams]
files = sorted(f for f in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{f}"))
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "main": sys.modules["__main__"].__file__,
    "cwd": os.getcwd(), "path": sys.path[0], "environment": dict(os.environ), "umask": os.umask(0),
    "input": sys.stdin.read(), "signals": signals, "blocked": blocked, "streams": streams, "files": files,
    "threads": threading.active_count(),
    "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
}))
"""
ENDS = {
    "0": "print('said')",
    "number": "import sys; sys.exit(3)",
    "words": "import sys; sys.exit('no such thing')",
    "nothing": "import sys; sys.exit(None)",
    "large": "import sys; sys.exit(256 + 7)",
    "exception": "raise ValueError('odd')",
    "Ctrl-C": "raise KeyboardInterrupt",
    "signal": "import os; os.kill(os.getpid(), 15)",
    "at once": "import os; print('lost'); os._exit(4)",
    "at exit": "import atexit; atexit.register(print, 'at exit'); print('said'); raise SystemExit(5)",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "daemon": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
}


def ends(script, *arguments, **options):
    process = start(*arguments, script=script, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, [line for line in err.splitlines() if not line.startswith("  ")]


def test_it_finds_what_a_fresh_interpreter_finds(tmp_path):
    script = tmp_path / "looks.py"
    script.write_text(LOOKS)
    given = {"cwd": tmp_path, "env": {"DSAM_TEST": "é\n"}}
    (_, warm, said), (_, cold, _) = (ends(script, "a b", "é", cold=cold, **given) for cold in (False, True))
    assert said == [] and json.loads(warm) == json.loads(cold)
    led = json.loads(ends(script, session=True, **given)[1])["leads"]
    assert led == [True, True]


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_as_a_fresh_interpreter_ends(tmp_path, how):
    script = tmp_path / "ends.py"
    script.write_text(ENDS[how])
    assert ends(script) == ends(script, cold=True)


def test_one_does_not_see_what_another_did(tmp_path):
    script = tmp_path / "changes.py"
    script.write_text(
        "import os, random, sys, numpy, dsam\n"
        "print(random.random(), numpy.random.random(), hasattr(dsam, 'changed'), 'CHANGED' in os.environ)\n"
        "dsam.changed, os.environ['CHANGED'] = True, '1'\n"
    )
    one, other = (ends(script)[1].split() for _ in range(2))
    assert one[2:] == other[2:] == ["False", "False"]
    assert one[0] != other[0] and one[1] != other[1]


def test_a_killed_one_is_told_and_a_signal_reaches_one_that_hears(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text("import time; print('begun', flush=True); time.sleep(60)")
    for send, status in ((signal.SIGKILL, -9), (signal.SIGINT, -2), (signal.SIGTERM, -15)):
        process = start(script=script)
        assert process.stdout.readline() == "begun\n" and process.poll() is None
        process.send_signal(send)
        assert process.wait(timeout=30) == status
        process.kill()  # nothing, by now


def test_what_it_starts_by_multiprocessing_is_forked_and_has_its_own_state(tmp_path):
    script = tmp_path / "starts.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        "def look(queue):\n"
        "    queue.put((os.getppid(), str(signal.getsignal(15)), 'torch' in sys.modules, __name__, os.getpid()))\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGTERM, print)\n"
        "    for method in ('spawn', 'forkserver'):\n"
        "        context = multiprocessing.get_context(method)\n"
        "        queue = context.Queue()\n"
        "        process = context.Process(target=look, args=(queue,))\n"
        "        process.start()\n"
        "        parent, handler, warm, name, pid = queue.get()\n"
        "        process.join()\n"
        "        print((parent == os.getpid(), handler, name, pid == process.pid, process.exitcode, warm))\n"
    )
    (status, warm, said), (_, cold, _) = (ends(script, cold=cold) for cold in (False, True))
    assert (status, said) == (0, [])
    assert warm == cold.replace("False)", "True)")
