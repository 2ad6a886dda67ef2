"""Fresh processes with the real client: saved folders, exports and repositories of a Hub-shaped server on loopback."""

import json
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from diffusers import DDPMPipeline, DDPMScheduler
from fresh_process import ended, start_fresh
from hub_cases import cases, unet
from hub_server import HubServer, Repository
from packaging.version import Version

import diffusers_ext as ext
from diffusers_ext import cli, models, schedulers
from diffusers_ext.hub import export_code, export_model, export_pipeline, push_folder, push_to_hub
from diffusers_ext.shipped import load_network

NAMES = list(cases("two.npz"))
# One for each of our pipelines; those of the flow have a pipeline among their components.
WITH_CODE = ("boost-ddim", "upsampler-ddim", "edm2-latent", "discrete-image", "flow-heun", "sdxl-boost", "dit-boost")
BASE = "diffusers:DiffusionPipeline.from_pretrained"
LOAD = "diffusers_ext.shipped:load_pipeline"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SHORT = {"num_inference_steps": 3, "output_type": "np"}


class Client:
    """A process of its own that loads what it is asked to. mode: of hub_client.py."""

    def __init__(self, mode: str, home: Path, url: str):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_MODULES_CACHE": str(home / "modules")}
        home.mkdir()
        self.log = home / "log"
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(300)
            port = server.getsockname()[1]
            self.process = start_fresh("hub_client.py", mode, port, said=self.log, **environment)
            self.socket = server.accept()[0]
        self.socket.setblocking(True)
        self.channel = self.socket.makefile("rw")

    def ask(self, function: str, *args, call: dict | None = None, **kwargs) -> dict:
        request = {"function": function, "args": [str(arg) for arg in args], "kwargs": kwargs, "call": call}
        print(json.dumps(request), file=self.channel, flush=True)
        answer = self.channel.readline()
        assert answer, self.log.read_text()
        return json.loads(answer)

    def load(self, *args, **kwargs) -> dict:
        """With trust in the code, by DiffusionPipeline."""
        return self.ask(BASE, *args, trust_remote_code=True, **kwargs)

    def close(self):
        self.channel.close()
        self.socket.close()
        ended(self.process, self.log)


class World:
    """Tiny pipelines saved and exported in a folder, the samples that they draw, and a server that holds them."""

    def __init__(self, folder: Path):
        images = (np.random.default_rng(0).random((2, 4, 4, 3)) * 255).astype(np.uint8)
        np.savez(folder / "two.npz", images, np.array([1, 3]))
        self.folder, self.hub = folder, HubServer()
        self.cases = cases(str(folder / "two.npz"))
        self.expected = {name: case.sample() for name, case in self.cases.items()}
        for name, case in self.cases.items():
            pipe = case.build()
            pipe.save_pretrained(folder / "saved" / name)
            self.hub.add_folder(f"org/{name}", export_pipeline(pipe, folder / "export" / name))
        for name in WITH_CODE:
            cls = type(self.cases[name].build())
            self.hub.add_folder(f"org/{cls.__name__}", export_code(cls, folder / "code" / cls.__name__))
            self.hub.add_folder(f"org/{name}-stock", self._without_class(name))
        DDPMPipeline(unet(classes=None), DDPMScheduler()).save_pretrained(folder / "saved/plain")
        self.hub.add_folder("org/plain", folder / "saved/plain")

    def _without_class(self, name: str) -> Path:
        """A repository of the components, whose own pipeline is another."""
        folder = self.folder / "stock" / name
        shutil.copytree(self.folder / "export" / name, folder)
        for code in folder.glob("*.py"):
            code.unlink()
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}))
        return folder

    def check(self, answer: dict, name: str, cls: str | None = None):
        assert "sample" in answer, answer
        assert answer["type"] == (cls or type(self.cases[name].build()).__name__)
        np.testing.assert_allclose(np.array(answer["sample"]), self.expected[name], atol=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    with world.hub:
        yield world


@pytest.fixture
def hub(world):
    yield world.hub
    world.hub.damage.clear()


def client(mode):
    @pytest.fixture(scope="module")
    def started(world, tmp_path_factory):
        client = Client(mode, tmp_path_factory.mktemp("home") / mode, world.hub.url)
        yield client
        client.close()

    return started


hidden = client("hidden")  # diffusers_ext cannot be imported
package = client("package")


@pytest.fixture
def here(hub, monkeypatch):
    """This process talks to the server too."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its storage is not on loopback
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "*")
    return hub


@pytest.fixture
def offline(hidden, package):
    for one in (hidden, package):
        one.ask("__main__:set_offline", offline=True)
    yield
    for one in (hidden, package):
        one.ask("__main__:set_offline", offline=False)


# every pipeline with every scheduler and network


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_where_the_package_is(name, world, package):
    """By class, and by DiffusionPipeline once diffusers_ext is imported."""
    folder, cls = world.folder / "saved" / name, type(world.cases[name].build()).__name__
    module = "diffusers_ext" if hasattr(ext, cls) else "diffusers"
    for function in (f"{module}:{cls}.from_pretrained", BASE):
        world.check(package.ask(function, folder, call=world.cases[name].call), name)


@pytest.mark.parametrize("name", NAMES)
def test_exported_and_loaded_where_it_is_not(name, world, hidden):
    """By path and from the Hub."""
    for place in (world.folder / "export" / name, f"org/{name}"):
        world.check(hidden.load(place, call=world.cases[name].call), name)


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_of_one_repository_runs_the_components_of_another(name, world, hidden):
    cls = type(world.cases[name].build()).__name__
    call = world.cases[name].call
    world.check(hidden.load(f"org/{name}-stock", custom_pipeline=f"org/{cls}", call=call), name)


def test_every_pipeline_scheduler_and_network_is_covered(world):
    pipes = [case.build() for case in world.cases.values()]
    found = {type(part).__name__ for pipe in pipes for part in [pipe, *pipe.components.values()]}
    assert {name for name in ext.pipelines.__all__ if name.endswith("Pipeline")} <= found
    ours = {name for name in schedulers.__all__ if name.endswith("Scheduler")}
    assert {name for name in ours - found if not name.startswith("Table")} == set()  # a test below loads those
    networks = {name for name in models.__all__ if isinstance(getattr(models, name), type) and "Output" not in name}
    # classifiers are no component of a pipeline; ClassifierGuidance wraps networks and is not saved
    assert networks - found == {"ImageClassifier", "NoiseAwareClassifier", "ClassifierGuidance"}


# parts of repositories


@pytest.mark.parametrize(
    "name", ["boost-ddpm", "boost-ddim", "boost-euler", "boost-dpm", "edm2-guided", "discrete-image"]
)
def test_a_scheduler_by_itself(name, world, package):
    scheduler = world.cases[name].build().scheduler
    function = f"diffusers_ext:{type(scheduler).__name__}.from_pretrained"
    answer = package.ask(function, f"org/{name}", subfolder="scheduler")
    expected = json.loads(json.dumps(dict(scheduler.config), default=str))
    ours = {key: value for key, value in expected.items() if not key.startswith("_")}
    assert {key: answer["config"][key] for key in ours} == ours


@pytest.mark.parametrize("name", [name for name in schedulers.__all__ if name.startswith("Table")])
def test_a_scheduler_of_no_pipeline(name, hub, package, tmp_path):
    settings = {"timestep_tables": {"2": [1.0, 0.4, 0.1]}, "timestep_spacing": "table"}
    own = {"mask_token_id": 3} if name == "TableAmusedScheduler" else {}
    getattr(ext, name)(**own, **settings).save_pretrained(tmp_path / "scheduler")
    hub.add_folder(f"org/{name}", tmp_path)
    answer = package.ask(f"diffusers_ext:{name}.from_pretrained", f"org/{name}", subfolder="scheduler")
    assert {key: answer["config"][key] for key in settings} == settings


@pytest.mark.parametrize(
    ("name", "part"),
    [("edm2-guided", "unet"), ("boost-ddpm", "unet"), ("discrete-text", "model"), ("discrete-sequence", "model"),
     ("discrete-image", "model")],
)  # fmt: skip
def test_a_network_by_itself(name, part, world, package):
    network = world.cases[name].build().components[part]
    answer = package.ask(f"diffusers_ext:{type(network).__name__}.from_pretrained", f"org/{name}", subfolder=part)
    expected = {key: float(value.double().sum()) for key, value in network.state_dict().items()}
    assert answer["weights"] == pytest.approx(expected)


def test_an_exported_network(hub, hidden, package, tmp_path):
    """By AutoModel without the package; by its class with it."""
    network = load_network("mnist-classifier")
    folder = export_model(network, tmp_path / "out", repo_id="org/classifier")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "image_classifier.py"
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert 'AutoModel.from_pretrained("org/classifier", trust_remote_code=True)' in card
    assert "license: apache-2.0" in card  # as the card beside the shipped weights says
    hub.add_folder("org/classifier", folder)
    expected = {key: float(value.double().sum()) for key, value in network.state_dict().items()}
    trusted = hidden.ask("diffusers:AutoModel.from_pretrained", "org/classifier", trust_remote_code=True)
    assert trusted["type"] == "ImageClassifier" and trusted["weights"] == pytest.approx(expected)
    assert "trust_remote_code" in hidden.ask("diffusers:AutoModel.from_pretrained", "org/classifier")["message"]
    answer = package.ask("diffusers_ext:ImageClassifier.from_pretrained", "org/classifier")
    assert answer["weights"] == pytest.approx(expected)


# trust, revisions


def test_code_needs_trust(world, hidden, package):
    for answer in (
        hidden.ask(BASE, "org/boost-ddim"),
        hidden.ask(BASE, "org/boost-ddim-stock", custom_pipeline="org/BoostAndSkipPipeline"),
        package.ask(LOAD, "org/boost-ddim"),
        package.ask(LOAD, str(world.folder / "export/boost-ddim")),
    ):
        assert answer["error"] == "ValueError" and "trust_remote_code=True" in answer["message"], answer


def test_a_saved_pipeline_that_was_never_exported_is_refused(world, hub, hidden):
    hub.add_folder("org/saved", world.folder / "saved/boost-ddim")
    answer = hidden.load("org/saved")
    assert answer["error"] == "ValueError" and "does not exist in org/saved" in answer["message"]


def test_a_commit_is_pinned(hub, hidden, package, tmp_path):
    samples, shas = [], []
    for seed in (0, 1):
        pipe = ext.BoostAndSkipPipeline(unet(classes=None, seed=seed), ext.BoostAndSkipDDIMScheduler(gamma=2.0 + seed))
        shas.append(hub.add_folder("org/pinned", export_pipeline(pipe, tmp_path / f"{seed}")))
        hub.repositories["org/pinned"].refs[f"v{seed}"] = shas[-1]
        samples.append(hidden.load(tmp_path / f"{seed}", call=SHORT)["sample"])
    assert not np.allclose(*samples, atol=1e-3)
    for revision, sample in ((shas[0], 0), ("v0", 0), (None, 1), ("main", 1), ("v1", 1)):
        answer = hidden.load("org/pinned", revision=revision, call=SHORT)
        np.testing.assert_allclose(answer["sample"], samples[sample], atol=1e-4, err_msg=str(revision))
    for revision, sample in (("v0", 0), (None, 1)):
        answer = package.ask(LOAD, "org/pinned", revision=revision, trust_remote_code=True, call=SHORT)
        np.testing.assert_allclose(answer["sample"], samples[sample], atol=1e-4, err_msg=str(revision))
        assert answer["name_or_path"] == "org/pinned"
    for answer in (hidden.load("org/pinned", revision="v2"), package.ask(LOAD, "org/pinned", revision="v2")):
        assert "OSError" in answer["bases"] and "org/pinned" in answer["message"], answer
    assert "Revision Not Found" in answer["message"]


def test_a_commit_of_the_code_is_pinned(world, hub, hidden):
    repository = hub.repositories["org/BoostAndSkipPipeline"]
    good, files = repository.refs["main"], repository.files()
    repository.add({**files, "pipeline.py": files["pipeline.py"] + b"\nraise RuntimeError('newer code')\n"})
    try:
        options = {"custom_pipeline": "org/BoostAndSkipPipeline", "call": world.cases["boost-ddim"].call}
        assert hidden.load("org/boost-ddim-stock", **options)["message"] == "newer code"
        world.check(hidden.load("org/boost-ddim-stock", custom_revision=good, **options), "boost-ddim")
    finally:
        repository.refs["main"] = good


# without a network


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.38"), reason="diffusers 0.37 does not ask for a commit"
)
def test_what_the_cache_has_loads_without_a_network(world, hub, hidden, package, request):
    """diffusers asks the Hub for the commit of code, so an export is loaded from the folder of its snapshot."""
    call = world.cases["boost-ddim"].call
    plain = hidden.ask(BASE, "org/plain", call=SHORT)["sample"]
    snapshot = hidden.ask("huggingface_hub:snapshot_download", "org/boost-ddim")["value"]
    world.check(package.ask(LOAD, "org/boost-ddim", trust_remote_code=True, call=call), "boost-ddim")
    with hub.stopped():
        assert hidden.ask(BASE, "org/plain", call=SHORT)["sample"] == plain
        assert "refused" in hidden.load("org/boost-ddim")["message"]
        assert "refused" in package.ask(LOAD, "org/boost-ddim", trust_remote_code=True)["message"]
        asked = len(hub.requests)
        request.getfixturevalue("offline")
        assert hidden.ask(BASE, "org/plain", call=SHORT)["sample"] == plain
        assert hidden.load("org/boost-ddim")["error"] == "OfflineModeIsEnabled"
        again = hidden.ask("huggingface_hub:snapshot_download", "org/boost-ddim", local_files_only=True)["value"]
        assert again == snapshot
        world.check(hidden.load(snapshot, call=call), "boost-ddim")
        world.check(package.ask(LOAD, "org/boost-ddim", trust_remote_code=True, call=call), "boost-ddim")
        never = package.ask(LOAD, "org/edm2-guided", trust_remote_code=True)
        assert never["error"] == "ValueError" and "not in the cache" in never["message"]
    assert len(hub.requests) == asked


def test_local_files_only(world, hidden, package):
    hidden.ask(BASE, "org/plain")
    assert hidden.ask(BASE, "org/plain", local_files_only=True)["type"] == "DDPMPipeline"
    options = {"trust_remote_code": True, "call": world.cases["boost-euler"].call}
    missing = package.ask(LOAD, "org/boost-euler", local_files_only=True, **options)
    assert "not in the cache" in missing["message"]
    world.check(package.ask(LOAD, "org/boost-euler", **options), "boost-euler")
    world.check(package.ask(LOAD, "org/boost-euler", local_files_only=True, **options), "boost-euler")


# what is missing or damaged


@pytest.mark.parametrize("mode", ["hidden", "package"])
def test_a_missing_repository(mode, hub, request):
    one = request.getfixturevalue(mode)
    answer = one.ask(BASE if mode == "hidden" else LOAD, "org/none")
    assert "OSError" in answer["bases"] and "org/none" in answer["message"], answer
    if mode == "package":
        assert "Repository Not Found" in answer["message"] and "is no folder" in answer["message"]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (WEIGHTS, "no file named diffusion_pytorch_model"),
        ("unet/config.json", "config.json"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
        ("scheduler/scheduling_boost_and_skip.py", "scheduler/scheduling_boost_and_skip.py as defined in"),
        ("respacing.py", "respacing.py"),
        ("model_index.json", "model_index.json"),
    ],
)
def test_a_missing_file(gone, message, hub, hidden, tmp_path):
    repo = "org/without-" + gone.replace("/", "-").replace(".", "-").replace("_", "-")
    files = hub.repositories["org/boost-ddim"].files()
    hub.repositories[repo] = Repository()
    hub.repositories[repo].add({path: content for path, content in files.items() if path != gone})
    answer = hidden.load(repo)
    assert "error" in answer and message in answer["message"], answer


def test_a_broken_download_is_taken_up_again(world, hub, hidden, tmp_path):
    """The client goes on in the same call or leaves the rest for the next; never is half a file loaded."""
    hub.damage[WEIGHTS] = None
    options = {"cache_dir": str(tmp_path), "call": world.cases["boost-ddim"].call}
    first = hidden.load("org/boost-ddim", **options)
    if "error" not in first:
        world.check(first, "boost-ddim")
    assert WEIGHTS not in hub.damage
    world.check(hidden.load("org/boost-ddim", **options), "boost-ddim")


def test_the_server_sends_ranges(here):
    content = here.repositories["org/boost-ddim"].files()[WEIGHTS]
    url = f"{here.url}/org/boost-ddim/resolve/main/{WEIGHTS}"
    with huggingface_hub.utils.get_session().stream(
        "GET", url, headers={"Range": "bytes=10-19"}, follow_redirects=True
    ) as part:
        assert part.status_code == 206 and part.read() == content[10:20]


@pytest.mark.parametrize("mode", ["hidden", "package"])
def test_a_short_file_is_refused(mode, hub, request, tmp_path):
    hub.damage[WEIGHTS] = lambda content: content[:-8]
    one = request.getfixturevalue(mode)
    options = {"trust_remote_code": True, "cache_dir": str(tmp_path)}
    answer = one.ask(BASE if mode == "hidden" else LOAD, "org/boost-ddim", **options)
    assert "Consistency check failed" in answer["message"], answer
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.is_file()]


def flipped(content: bytes) -> bytes:
    """The same length with other weights: the highest bit of each fraction, so that all of them stay finite."""
    return content[:-4000] + bytes(byte ^ 0x40 if i % 4 == 2 else byte for i, byte in enumerate(content[-4000:]))


@pytest.mark.parametrize("damaged", [WEIGHTS, "scheduler/scheduler_config.json"])
def test_other_bits_of_the_same_length_are_found(damaged, world, hub, package, tmp_path):
    options = {"trust_remote_code": True, "cache_dir": str(tmp_path), "call": world.cases["boost-ddim"].call}
    hub.damage[damaged] = flipped if damaged == WEIGHTS else lambda content: content.replace(b"1000", b"1001")
    answer = package.ask(LOAD, "org/boost-ddim", **options)
    assert answer.get("error") == "ValueError" and f"{damaged} in" in answer["message"], answer
    hub.damage.clear()
    assert package.ask(LOAD, "org/boost-ddim", **options) == answer  # the cache keeps it
    Path(answer["message"].split(" delete ")[1].removesuffix(" and load again")).unlink()
    world.check(package.ask(LOAD, "org/boost-ddim", **options), "boost-ddim")


def test_diffusers_compares_no_hashes(world, hub, package, tmp_path):
    """huggingface_hub compares sizes alone: why docs/hub.md tells of check_download."""
    hub.damage[WEIGHTS] = flipped
    answer = package.load("org/boost-ddim", cache_dir=str(tmp_path), call=world.cases["boost-ddim"].call)
    assert not np.allclose(answer["sample"], world.expected["boost-ddim"], atol=1e-3)
    (snapshot,) = tmp_path.glob("models--org--boost-ddim/snapshots/*")
    assert f"{WEIGHTS} in" in package.ask("diffusers_ext.hub:check_download", snapshot)["message"]


# pushing


@contextmanager
def logged_in(client: Client, token: str):
    client.ask("os:environ.__setitem__", "HF_TOKEN", token)
    yield
    client.ask("os:environ.__setitem__", "HF_TOKEN", "")


def test_pushed_and_loaded_without_the_package(world, here, hidden):
    case = world.cases["boost-ddim"]
    address = push_to_hub(case.build(), "me/pushed", "mit", private=True)
    repository = here.repositories["me/pushed"]
    assert repository.private and address == f"{here.url}/me/pushed/commit/{repository.refs['main']}"
    assert len(repository.commits) == 2  # that of its making, and one push
    exported = world.folder / "export/boost-ddim"
    assert set(repository.files()) == {".gitattributes"} | {
        path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()
    }
    card = repository.files()["README.md"].decode()
    assert "license: mit" in card and 'from_pretrained("me/pushed", trust_remote_code=True)' in card
    assert "Cannot load model me/pushed" in hidden.load("me/pushed")["message"]  # it is private
    assert "boost_and_skip.py" in hidden.load("me/pushed", token=here.token)["message"]  # not for code
    with logged_in(hidden, here.token):
        world.check(hidden.load("me/pushed", call=case.call), "boost-ddim")


def test_a_push_replaces_what_would_be_loaded_and_keeps_the_rest(world, here, tmp_path):
    folder = world.folder / "export/boost-ddim"
    push_folder(folder, "me/again")
    repository = here.repositories["me/again"]
    assert not repository.private
    shards = {"unet/diffusion_pytorch_model.safetensors.index.json": b"{}", "unet/old.safetensors": b"old"}
    kept = {"NOTES.md": b"mine", "pictures/cat.png": b"png"}
    repository.add({**repository.files(), **shards, **kept})
    push_folder(folder, "me/again")
    assert set(repository.files()) == {".gitattributes", *kept} | {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    head = repository.refs["main"]
    assert push_folder(folder, "me/again").endswith(head) and repository.refs["main"] == head  # nothing is new


def test_refused_pushes(world, here):
    case = world.cases["boost-ddim"]
    with pytest.raises(ValueError, match="Repo id must"):
        push_to_hub(case.build(), "me/too/many")
    with pytest.raises(OSError, match="401"):
        push_to_hub(case.build(), "me/unseen", token="hf_of_nobody")
    assert "me/unseen" not in here.repositories
    here.repositories["me/public"] = Repository()
    before = here.repositories["me/public"].add({"NOTES.md": b"mine"})
    with pytest.raises(ValueError, match="'me/public' exists and is public"):
        push_to_hub(case.build(), "me/public", private=True)
    assert here.repositories["me/public"].refs["main"] == before


def test_a_push_that_fails_changes_nothing(world, here, monkeypatch):
    push_folder(world.folder / "export/boost-ddim", "me/steady")
    before = here.repositories["me/steady"].refs["main"]
    monkeypatch.setattr(here, "large", {})  # other tests may have pushed these weights
    monkeypatch.setattr("hub_server._Handler.take_large", lambda self, oid: self.fail(403, "Forbidden", "no room"))
    with pytest.raises(Exception, match=r"403|uploading"):
        push_folder(world.folder / "export/edm2-guided", "me/steady")
    assert here.repositories["me/steady"].refs["main"] == before


def test_the_command_pushes(world, here, hidden, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(cli.main, ["export", *map(str, arguments)])

    model = world.folder / "saved/boost-ddim"
    done = invoke(model, tmp_path / "out", "--push-to-hub", "me/command", "--private")
    assert done.exit_code == 0 and f"pushed {here.url}/me/command/commit/" in done.output, done.output
    assert here.repositories["me/command"].private
    with logged_in(hidden, here.token):
        world.check(hidden.load("me/command", call=world.cases["boost-ddim"].call), "boost-ddim")
    done = invoke("boost-and-skip", tmp_path / "code", "--push-to-hub", "me/code")
    assert done.exit_code == 0, done.output
    card = here.repositories["me/code"].files()["README.md"].decode()
    assert 'custom_pipeline="me/code", trust_remote_code=True' in card and "license: apache-2.0" in card
    options = {"custom_pipeline": "me/code", "call": world.cases["boost-ddim"].call}
    world.check(hidden.load("org/boost-ddim-stock", **options), "boost-ddim")
    assert invoke("mnist-classifier", tmp_path / "network").exit_code == 0
    assert (tmp_path / "network/image_classifier.py").is_file()
    refused = invoke(model, tmp_path / "more", "--private")
    assert refused.exit_code == 2 and "--private is for --push-to-hub" in refused.output
    refused = invoke(model, tmp_path / "more", "--push-to-hub", "me//bad")
    assert refused.exit_code == 1 and "Repo id must" in refused.output and not (tmp_path / "more").exists()
