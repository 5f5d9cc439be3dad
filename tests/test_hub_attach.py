"""`llmkit.attach("hub")` in a notebook server that a real JupyterHub has started: the essentials of
`LLM` on the hub's models, with the notebook's own token and without llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator

import nbformat
import pytest
from conftest import ROOT
from hub_server import UserServer
from hub_service import HubWithModels, ask
from jupyter_client_http import Kernel

pytestmark = pytest.mark.model

ENGINE = "n_ctx = 1024\nn_slots = 4\n"
# A user's image has none of what an engine needs.
WITHOUT = """
import sys
for name in ("llama_cpp", "llguidance", "gguf"):
    sys.modules[name] = None
import json, llmkit
llm = llmkit.attach("hub:smollm2")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWithModels]:
    hub = HubWithModels(tmp_path_factory.mktemp("hub"), ["smollm2", "minilm"], ENGINE)
    yield hub
    hub.stop()
    assert not hub.tracebacks(), hub.output()


@pytest.fixture(scope="module")
def ann(hub: HubWithModels) -> UserServer:
    return hub.spawn("ann")


@pytest.fixture(scope="module")
def kernel(ann: UserServer) -> Iterator[Kernel]:
    kernel = ann.kernel()
    kernel.run(WITHOUT)
    yield kernel
    kernel.close()


def value(kernel: Kernel, expression: str) -> object:
    return json.loads(kernel.run(f"print(json.dumps({expression}))").strip().splitlines()[-1])


def test_it_is_the_hub_s(hub: HubWithModels, kernel: Kernel) -> None:
    assert value(kernel, "[llm.name, llm.model.n_ctx, llm.engine.origin.url]") == [
        "smollm2", 1024, hub.service,
    ]  # fmt: skip
    assert value(kernel, "llm.model.path.count('/')") == 0, "the server's folders are its own"
    assert value(kernel, "llmkit.attach('hub').name") == "smollm2", "the first is the default"
    usage = ask("GET", f"{hub.service}/usage", token=hub.token("ann")).json
    assert usage["caller"] == "hub user ann"


def test_text(kernel: Kernel) -> None:
    text = value(kernel, "llm.chat('What is the capital of France?', max_tokens=20).text")
    assert isinstance(text, str) and text
    parts = value(kernel, "list(llm.stream('Once', max_tokens=8, temperature=0))")
    whole = value(kernel, "llm.generate('Once', max_tokens=8, temperature=0).text")
    assert isinstance(parts, list) and "".join(parts) == whole
    many = value(kernel, "[c.finish_reason for c in llm.generate(['One'] * 9, max_tokens=3)]")
    assert many == ["length"] * 9
    assert value(kernel, "llm.detokenize(llm.tokenize('Hello there'))") == "Hello there"


def test_stop(kernel: Kernel) -> None:
    """■ ends what the hub computes."""
    code = (
        "import _thread, threading, time\n"
        "while llm.stats.num_running: time.sleep(0.05)\n"
        "def press():\n"
        "    while not llm.stats.num_running: time.sleep(0.05)\n"
        "    _thread.interrupt_main()\n"
        "try:\n"
        "    threading.Thread(target=press).start()\n"
        "    llm.generate('Once upon a time', max_tokens=900, ignore_eos=True)\n"
        "except KeyboardInterrupt: made = llm.last\n"
        "end = time.monotonic() + 30\n"
        "while llm.stats.num_running and time.monotonic() < end: time.sleep(0.05)"
    )
    kernel.run(code)
    assert value(kernel, "[made.finish_reason, llm.stats.num_running]") == ["abort", 0]


def test_what_a_model_knows(kernel: Kernel) -> None:
    probabilities = value(
        kernel,
        "[len(p.top) for p in "
        "llm.generate('One, two,', max_tokens=4, temperature=0, logprobs=3).logprobs]",
    )
    assert probabilities == [3] * 4
    schema = "{'type': 'object', 'properties': {'n': {'type': 'integer'}}, 'required': ['n']}"
    made = value(kernel, f"llm.chat('A number.', json_schema={schema}, max_tokens=30).text")
    assert isinstance(made, str) and made.lstrip().startswith("{")
    kernel.run(
        "asked = []\n"
        "def weather(city: str) -> str:\n"
        "    '''The weather of a city.'''\n"
        "    asked.append(city)\n"
        "    return 'rain'\n"
        "said = llm.chat('Weather in Paris?', tools=[weather], tool_choice='weather',"
        " max_tokens=60, seed=1)"
    )
    assert value(kernel, "len(asked) > 0") is True


def test_vectors_and_tables(kernel: Kernel) -> None:
    shape = value(kernel, "list(llmkit.attach('hub:minilm').embed(['one', 'two']).shape)")
    assert shape == [2, 384]
    kernel.run(
        "import pandas as pd\n"
        "frame = pd.DataFrame({'text': [f'word {i}' for i in range(12)]})\n"
        "made = llm.map(frame, 'Repeat: {text}', max_tokens=2, temperature=0)"
    )
    assert value(kernel, "[len(made), int(made['answer_error'].isna().sum())]") == [12, 12]
    assert value(kernel, "llm.stats.num_slots") == 4
    session = "s = llm.session('Be brief.'); s.say('Yes?', max_tokens=4); "
    kernel.run(session + "again = s.say('Again.', max_tokens=4)")
    assert value(kernel, "[len(s.messages), again.usage.cached_tokens > 5]") == [5, True]


def test_the_lesson(hub: HubWithModels, ann: UserServer) -> None:
    """Lesson 9 runs on a real hub as well as on its stand-in."""
    notebook = nbformat.read(ROOT / "notebooks" / "09_one_model_for_a_class.ipynb", as_version=4)
    kernel = ann.kernel()
    kernel.run(f"import sys; sys.path.insert(0, {str(ROOT / 'notebooks')!r})")
    kernel.run(f"import os; os.environ['BOB_TOKEN'] = {hub.token('bob')!r}")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kernel.run(cell.source)
    took = json.loads(kernel.run("import json; print(json.dumps(took))"))
    assert took["bob, a question"] < took["ann, 16 stories"]
    used = ask("GET", f"{hub.service}/usage", token=hub.token("bob")).json["total"]
    assert used["completion_tokens"] >= 24 + 60
    kernel.close()


def test_without_the_right(hub: HubWithModels) -> None:
    """Cat's server has a token without the scope; the error says which the admin must grant."""
    kernel = hub.spawn("cat").kernel()
    said = kernel.run(
        "import llmkit\n"
        "try:\n    llmkit.attach('hub')\n"
        "except llmkit.AccessError as error:\n    print(error)"
    )
    assert "access:services!service=llmkit" in said
    assert "c.Spawner.server_token_scopes" in said and "c.JupyterHub.load_roles" in said
    kernel.close()
