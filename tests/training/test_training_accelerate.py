"""The launch configurations under `examples/accelerate`, read by accelerate's own loader."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser


CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
EXPECTED = {  # name → (engine, machines, what it shares out)
    "ddp": ("MULTI_GPU", 1, {}),
    "fsdp2": ("FSDP", 1, {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
    "deepspeed-zero2": ("DEEPSPEED", 1, {"zero_stage": 2}),
    "deepspeed-zero3": ("DEEPSPEED", 1, {"zero_stage": 3}),
    "two-nodes-fsdp2": ("FSDP", 2, {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml")))
def test_accelerate_reads_the_configuration_as_meant(name):
    engine, machines, shared = EXPECTED[name]
    path = CONFIGURATIONS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert (config.distributed_type.value, config.num_machines) == (engine, machines)
    assert config.num_processes == 8 * machines
    # Precision is the recipe's: one given here would override it without a word.
    assert config.mixed_precision is None
    settings = {"DEEPSPEED": config.deepspeed_config, "FSDP": config.fsdp_config}.get(engine, {})
    assert shared.items() <= settings.items()
    if engine == "FSDP":
        # accelerate takes these from flags of the same names, and passes over those that it does not know
        assert set(settings) <= {action.dest for action in launch_command_parser()._actions}
        assert settings["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launch_command_in_the_header_is_one(name):
    path = CONFIGURATIONS / f"{name}.yaml"
    text = path.read_text("utf-8")
    commands = re.findall(r"^#.*?(accelerate launch .*)$", text, re.M)
    assert len(commands) == yaml.safe_load(text)["num_machines"]
    for rank, command in enumerate(commands):
        args = launch_command_parser().parse_args(command.split()[2:])
        assert Path(args.config_file).name == path.name and args.module
        assert args.training_script == "modeling_llava.cli.main"
        assert args.training_script_args == ["train", "RECIPE.yaml"]
        assert args.machine_rank in (None, rank)
