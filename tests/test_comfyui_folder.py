"""The folder of nodes for ComfyUI: its workflows, its manifest, and what importing it costs."""

import json
import subprocess
import sys

import comfyui_models as comfyui
import pytest

import convfusion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NODES = comfyui.load_nodes().NODE_CLASS_MAPPINGS
WORKFLOWS = sorted(comfyui.NODES.glob("workflows/*.json"))


def inputs_of(node):
    return NODES[node]().INPUT_TYPES()["required"]


@pytest.fixture(autouse=True)
def folder(tmp_path):
    comfyui.set_folder(tmp_path)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflows_fit_the_nodes(path):
    workflow = json.loads(path.read_text())
    ours = [node for node in workflow["nodes"] if node["type"] in NODES]
    assert ours
    for node in ours:
        inputs = inputs_of(node["type"])
        sockets = [name for name, (kind, *_) in inputs.items() if is_socket(kind)]
        assert [each["name"] for each in node["inputs"]] == sockets
        assert all(each["link"] is not None for each in node["inputs"])
        assert [each["type"] for each in node["outputs"]] == list(NODES[node["type"]].RETURN_TYPES)
        values = list(node["widgets_values"])
        for name, (kind, *options) in inputs.items():
            if is_socket(kind):
                continue
            value = values.pop(0)
            if not isinstance(kind, str):  # a list to choose from, which may be one of files
                assert value in (kind or [value]), name
            else:
                assert type(value) is {"INT": int, "FLOAT": float, "STRING": str}[kind], name
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= value <= options[0]["max"]
                assert value == options[0]["default"]
            if name == "seed":  # ComfyUI puts a widget behind it
                assert values.pop(0) == "fixed"
        assert values == []
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, slot, target, place, kind in workflow["links"]:
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link


def is_socket(kind):
    return isinstance(kind, str) and kind not in ("INT", "FLOAT", "STRING")


@pytest.mark.parametrize("name", NODES)
def test_the_arguments_are_those_that_the_node_declares(name):
    node = NODES[name]
    code = getattr(node, node.FUNCTION).__code__
    assert list(code.co_varnames[1 : code.co_argcount]) == list(inputs_of(name))
    assert name in comfyui.load_nodes().NODE_DISPLAY_NAME_MAPPINGS


def test_the_manifest_has_the_version_of_the_library():
    manifest = tomllib.loads((comfyui.NODES / "pyproject.toml").read_text())
    assert manifest["project"]["version"] == convfusion.__version__


def test_importing_the_folder_imports_nothing_heavy():
    """ComfyUI imports every node when it starts."""
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('nodes_here', {str(comfyui.NODES)!r}"
        " + '/__init__.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['nodes_here'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({'torch', 'diffusers', 'convfusion.checkpoint', 'comfy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
