"""What `import modeling_llava` does to transformers, in a process of its own."""

import subprocess
import sys
import textwrap

import pytest
from published import build
from transformers import LlavaImageProcessorPil

import modeling_llava
from modeling_llava.constants import installed


def run(program, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        **options,
    )


def test_names_that_are_not_there_and_packages_that_are_not_installed():
    with pytest.raises(AttributeError, match="LlavaNext"):
        modeling_llava.LlavaNext  # noqa: B018
    assert "LlavaModel" in dir(modeling_llava) and installed("a-package-of-nobody") is None


def test_import_of_every_module_says_nothing_and_needs_no_optional_package(tmp_path):
    result = run(
        """
        import importlib, pkgutil, sys
        optional = ("torchvision", "bitsandbytes", "peft", "openai", "gradio", "matplotlib", "spacy", "ray", "gguf", "llama_cpp")
        sys.modules |= dict.fromkeys(optional)  # importing one raises ImportError
        import modeling_llava, modeling_llava.conversion
        for package in (modeling_llava, modeling_llava.conversion):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        """,
        cwd=tmp_path,
    )
    assert result.stdout == "" and result.stderr == ""


def test_auto_classes_give_ours_whatever_was_saved(tmp_path):
    LlavaImageProcessorPil().save_pretrained(tmp_path)
    run(
        """
        import sys
        import modeling_llava
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
        folder = sys.argv[1]
        for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
            assert type(auto.from_pretrained(folder)).__module__.startswith("modeling_llava."), auto
        assert type(AutoImageProcessor.from_pretrained(".")).__module__ == "modeling_llava.image_processing_llava"
        pipe = pipeline("image-text-to-text", model=folder)
        assert type(pipe.model).__module__ == "modeling_llava.modeling_llava"
        assert type(pipe.processor).__module__ == "modeling_llava.processing_llava"
        settings = {"attn_implementation": {"text_config": "varlen"}}
        model = AutoModelForImageTextToText.from_pretrained(folder, **settings)
        assert model.model.language_model.config._attn_implementation == "varlen"
        model.set_attn_implementation({"text_config": "sdpa"})
        model.set_attn_implementation(settings["attn_implementation"])
        """,
        build("llava-hf"),
        cwd=tmp_path,
    )


def test_a_script_of_a_user_that_is_called_llava_gets_our_classes(tmp_path):
    tmp_path.joinpath("llava.py").write_text(
        "import modeling_llava\nfrom transformers import AutoConfig\nprint(type(AutoConfig.for_model('llava')).__module__)\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "llava.py"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "modeling_llava.configuration_llava"
