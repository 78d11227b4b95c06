"""A contestant that computes nothing: it notes when its rounds began and ended, and sleeps."""

import json
import os
import sys
import time

_, name, log, seconds = sys.argv
for line in sys.stdin:
    message = json.loads(line)
    answer = {}
    if message["do"] == "quit":
        break
    if message["do"] == "prepare":
        answer = {
            "compile_seconds": 0.0,
            "candidate": message.get("candidate", "a"),
            "tried": {} if "candidate" in message or name != "tries" else {"a": "1", "b": "2"},
            "variables": {"MALLOC_CONF": "of the first", "LD_PRELOAD": ""},
            "cores": sorted(os.sched_getaffinity(0)),
            "allocator": os.environ.get("MALLOC_CONF"),
            "process": os.getpid(),
        }
        if name == "refuses":
            answer = {"refused": "this network is unknown"}
    elif message["do"] == "run":
        if name == "ends":
            print("out of memory", file=sys.stderr)
            os._exit(9)
        start = time.monotonic()
        time.sleep(float(seconds) * message["steps"])
        end = time.monotonic()
        with open(log, "a") as file:
            print(name, start, end, message["steps"], file=file)
        answer = {"wall": (end - start) / message["steps"], "processor": 0.0}
    else:
        answer = {"resident_bytes": 2**60 if name == "large" else 1, "device_bytes": None}
    print(json.dumps(answer), flush=True)
