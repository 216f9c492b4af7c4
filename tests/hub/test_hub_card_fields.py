"""License and language of a card: the Hub's identifiers, and what is said of others."""

import pytest

from modeling_llava.cli.main import main
from modeling_llava.hub.card_fields import check_card_fields
from modeling_llava.hub.staging import finish_data_card


@pytest.mark.parametrize("license", [None, "apache-2.0", "llama3.1", "other", ["mit", "cc-by-4.0"]])
@pytest.mark.parametrize("language", [None, "en", "yue", "multilingual", ["de", "fr"]])
def test_what_the_hub_documents_is_taken(license, language):
    check_card_fields(license, language)


@pytest.mark.parametrize(
    "license, language, right",
    [
        ("Apache 2.0", "en", "apache-2.0"), ("Apache-2.0", "en", "apache-2.0"), ("MIT License", "en", "mit"),
        ("CC BY 4.0", "en", "cc-by-4.0"), ("Llama 2", "en", "llama2"), ("GPL-3.0-only", "en", "gpl-3.0"),
        ("my own", "en", "other"), ("", "en", "other"), ("mit", "English", "is it en"), ("mit", "EN", "is it en"),
        ("mit", "pt-BR", "is it pt"), ("mit", "German", "is it de"), ("mit", "xx", "ISO 639"),
    ],
)  # fmt: skip
def test_another_value_is_answered_by_the_hubs(license, language, right):
    wrong = repr(license if language == "en" else language)
    with pytest.raises(ValueError) as error:
        check_card_fields(license, language)
    assert wrong in str(error.value) and right in str(error.value).replace(wrong, "")


def test_a_data_sets_own_card_is_checked(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: Apache 2.0\nlanguage:\n- en\n---\n# Data\n")
    with pytest.raises(ValueError, match=r"README.md: 'Apache 2.0'.*apache-2.0"):
        finish_data_card(card, "me/data", None)
    finish_data_card(card, "me/data", "mit")  # in its place
    assert "license: mit" in card.read_text()
    for head, said in (("a: [", "head is not YAML"), ("- a", "head is a list")):
        card.write_text(f"---\n{head}\n---\n# Data\n")
        with pytest.raises(ValueError, match=said):
            finish_data_card(card, "me/data", None)


def test_a_dry_run_refuses_wrong_fields_and_names_before_anything_is_gathered(tmp_path, capsys):
    for words, said in (
        (["--license", "Apache 2.0"], "apache-2.0"),
        (["--language", "English"], "is it en"),
        (["--tag", "v 1"], "'v 1'"),
        (["--revision", "a..b"], "'a..b'"),
    ):
        assert main(["publish", str(tmp_path), "me/model", "--dry-run", *words]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
