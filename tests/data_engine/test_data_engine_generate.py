import asyncio
import dataclasses
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_dataset
from fault_server import answer
from PIL import Image

from modeling_llava.data_engine.contexts import Box, Context
from modeling_llava.data_engine.generate import estimate, generate, open_folder
from modeling_llava.data_engine.output import write_output
from modeling_llava.data_engine.prompts import DEFAULT_PROMPTS
from modeling_llava.data_engine.replies import parse_turns
from modeling_llava.data_engine.report import choose_samples, read_drop_list
from modeling_llava.data_engine.run import GenerateConfig, open_run
from modeling_llava.data_engine.samples import OutputSettings
from modeling_llava.endpoint import Ledger, Prices, Reply, RequestFault, RunSettings, Usage


BARE = OutputSettings(parquet=False, card=False, report_samples=0)
ALL = GenerateConfig("scripted", mix=(1, 1, 1))
COMPLEX = GenerateConfig("scripted", types=("complex",))


class Responder:
    """A `ChatModel` without a network."""

    name = "scripted"

    def __init__(self, reply=answer):
        self.reply, self.asked = reply, []

    async def complete(self, messages, **options):
        await asyncio.sleep(0)
        self.asked.append(messages)
        return Reply(self.reply(messages), usage=Usage(100, 20), model="scripted-1")


def contexts(number):
    boxes = (Box("thing", (0.1, 0.2, 0.3, 0.4)),)
    captions = [(f"a thing number {i} on a table", "it is red") for i in range(number)]
    return [Context(f"{i:03d}", f"{i:03d}.png", captions[i], boxes) for i in range(number)]


def make_images(folder):
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40 + i, 30), (20 * i, 90, 120)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def rows_of(out):
    return json.loads((out / "instruct.json").read_text("utf-8"))


def rejected_of(out):
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text("utf-8").splitlines()]


def test_each_type_becomes_a_llava_row(tmp_path):
    out = tmp_path / "run"
    summary = generate(out, Responder(), ALL, contexts=contexts(6), output=BARE)
    assert summary.run.accepted == 18 and summary.output.samples == {"conversation": 6, "detail": 6, "complex": 6}
    rows = rows_of(out)
    assert [row["id"] for row in rows[:3]] == ["000:conversation", "000:detail", "000:complex"]
    query = {"role": "user", "content": "a thing number 0 on a table\nit is red"}
    told = parse_turns(answer([{"role": "system", "content": "conversation"}, query]))
    turns = rows[0]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
    assert turns[0]["value"] in (f"<image>\n{told[0][0]}", f"{told[0][0]}\n<image>")
    assert [turn["value"] for turn in turns[1:]] == [told[0][1], *told[1]]
    assert rows[0]["image"] == "000.png" and rows[0]["type"] == "conversation"
    # A description's question comes out of the list.
    questions = open_run(out).prompts["detail"].questions
    assert rows[1]["conversations"][0]["value"].replace("<image>", "").strip() in questions
    firsts = Counter(row["conversations"][0]["value"].startswith("<image>") for row in rows)
    assert min(firsts.values()) >= 4  # the order of image and question is drawn


def test_mix_asks_every_image_for_the_largest_type_and_the_others_in_proportion(tmp_path):
    config = GenerateConfig("m")
    made = Counter(kind for i in range(7700) for kind in config.types if config.makes(f"image {i}", kind))
    assert made["complex"] == 7700
    assert abs(made["conversation"] - 5800) < 120 and abs(made["detail"] - 2300) < 120  # three standard deviations
    assert GenerateConfig("m", types=("conversation", "detail")).fractions == {"conversation": 1.0, "detail": 23 / 58}


def test_a_run_is_resumed_by_the_same_call_and_extended_by_a_higher_limit(tmp_path):
    out, model = tmp_path / "run", Responder()
    generate(out, model, ALL, contexts=contexts(8), limit=3, output=BARE)
    assert len(model.asked) == 9
    summary = generate(out, model, ALL, contexts=contexts(8), limit=8, output=BARE)
    assert len(model.asked) == 24 and summary.run.skipped == 9
    before = (out / "instruct.json").read_bytes()
    again = Responder()
    assert generate(out, again, ALL, contexts=contexts(8), output=BARE).run.skipped == 24 and not again.asked
    assert (out / "instruct.json").read_bytes() == before
    other = tmp_path / "other"
    generate(other, Responder(), ALL, contexts=contexts(8), output=BARE, settings=RunSettings(1))
    assert (other / "instruct.json").read_bytes() == before  # neither order nor interruptions show in the data


def test_a_run_is_not_resumed_with_other_settings_prompts_or_contexts(tmp_path):
    out = tmp_path / "run"
    generate(out, Responder(), ALL, contexts=contexts(2), output=BARE)
    for change in ({"model": "other"}, {"seed": 1}, {"mix": (1, 1, 2)}, {"types": ("detail",)}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} was .* and is "):
            generate(out, Responder(), dataclasses.replace(ALL, **change), contexts=contexts(2), output=BARE)
    shutil.copytree(DEFAULT_PROMPTS, tmp_path / "p")
    (tmp_path / "p" / "conversation" / "system_message.txt").write_text("A conversation, please.")
    with pytest.raises(ValueError, match="prompts was"):
        generate(out, Responder(), ALL, contexts=contexts(2), prompts=tmp_path / "p", output=BARE)
    with pytest.raises(ValueError, match="captions or boxes are not those"):
        generate(out, Responder(), ALL, contexts=contexts(3), output=BARE)
    (out / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="run.json is not"):
        open_run(out)
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match="no run.json"):
        generate(out, Responder(), ALL, contexts=contexts(2), output=BARE)
    with pytest.raises(ValueError, match="either contexts or a file"):
        open_folder(tmp_path / "new", ALL, contexts=contexts(1), captions="captions.json")
    with pytest.raises(ValueError, match="No context has captions"):
        open_folder(tmp_path / "new", ALL, contexts=[])


def test_a_dry_run_fixes_nothing(tmp_path):
    out = tmp_path / "run"
    estimate(open_folder(out, ALL, contexts=contexts(2)))
    other = dataclasses.replace(ALL, types=("complex",), seed=3)
    estimate(open_folder(out, other, contexts=contexts(5)))
    summary = generate(out, Responder(), other, contexts=contexts(3), output=BARE)
    assert summary.run.accepted == 3
    assert open_run(out).config == other  # settings and prompts of what was asked


def test_rejected_replies_are_retried_with_the_reason_counted_and_kept(tmp_path):
    def reply(messages):
        query = messages[-1]["content"]
        if "number 1 " in query:
            return "I'm sorry, but I can't see the image."  # once; the retry is answered
        if any("number 2 " in message["content"] for message in messages[-3:]):
            return "The caption says it is red."  # always
        return answer(messages)

    out, model = tmp_path / "run", Responder(reply)
    summary = generate(out, model, COMPLEX, contexts=contexts(4), output=BARE)
    assert (summary.run.accepted, summary.run.rejected) == (3, 1)
    assert [row["id"] for row in rows_of(out)] == ["000:complex", "001:complex", "003:complex"]
    rejected = rejected_of(out)
    assert [(row["id"], row["attempt"], row["reason"]) for row in rejected] == [
        ("001:complex", 1, "refusal"),
        ("002:complex", 1, "no_parse"),
        ("002:complex", 2, "no_parse"),
    ]
    assert rejected[0]["reply"] == "I'm sorry, but I can't see the image."
    assert summary.output.rejected == {"complex": {"refusal": 1, "no_parse": 2}}
    retries = [messages for messages in model.asked if "last reply" in messages[-1]["content"]]
    assert len(retries) == 2 and any("refused" in messages[-1]["content"] for messages in retries)


def test_what_the_endpoint_refuses_is_kept_and_counted_as_rejected(tmp_path):
    def reply(messages):
        if "number 1 " in messages[-1]["content"]:
            raise RequestFault("400", "Your prompt was filtered")
        return answer(messages)

    out, settings = tmp_path / "run", OutputSettings(parquet=False)
    for skipped in (0, 4):  # the second time nothing is asked
        summary = generate(out, Responder(reply), COMPLEX, contexts=contexts(4), output=settings)
        assert summary.run.skipped == skipped and not summary.run.given_up
    assert [row["id"] for row in rows_of(out)] == ["000:complex", "002:complex", "003:complex"]
    row = {"id": "001:complex", "type": "complex", "attempt": 1, "reason": "refused_by_endpoint"}
    assert rejected_of(out) == [{**row, "detail": "400: Your prompt was filtered", "reply": ""}]
    for file in ("README.md", "report.html"):
        assert "the endpoint refuses the request" in (out / file).read_text()
    assert "What the endpoint refused to answer is there too." in (out / "README.md").read_text()
    figures = json.loads((out / "summary.json").read_text())
    assert (figures["requests"], figures["replies"], figures["faults"]) == (4, 3, {"400": 1})


def test_near_duplicate_questions_are_removed_across_the_set_and_kept_on_request(tmp_path):
    def reply(messages):
        tag = messages[-1]["content"].split()[3]
        return (
            "Question:\nWhat color is the table in the image?\n===\nAnswer:\nThe wood of it is brown.\n===\n"
            f"Question:\nWhich secret does the drawer {tag} hold{tag}?\n===\nAnswer:\nOne sees nothing of the kind."
        )

    out = tmp_path / "run"
    config = GenerateConfig("scripted", types=("conversation",))
    summary = generate(out, Responder(reply), config, contexts=contexts(5), output=BARE)
    assert summary.output.near_duplicates == {"conversation": 4}
    rows = rows_of(out)
    assert [len(row["conversations"]) for row in rows] == [4, 2, 2, 2, 2]
    for row in rows:  # the image token is in the question that is now the first
        assert ["<image>" in turn["value"] for turn in row["conversations"]].index(True) == 0
        assert json.dumps(row).count("<image>") == 1
    removed = [row for row in rejected_of(out) if row["reason"] == "near_duplicate_question"]
    assert len(removed) == 4 and removed[0]["detail"].startswith("000:conversation: What color")
    folder = open_run(out)
    with Ledger(out / "ledger.jsonl") as ledger:
        for repeats, kept in ((2, [4, 4, 2, 2, 2]), (None, [4] * 5)):
            settings = OutputSettings(repeats, parquet=False, card=False, report_samples=0)
            write_output(folder, ledger, images=None, settings=settings)
            assert [len(row["conversations"]) for row in rows_of(out)] == kept


def test_images_that_are_absent_are_not_asked_for(tmp_path, images, capsys):
    for i in (2, 5):
        (images / f"{i:03d}.png").unlink()
    model = Responder()
    some = [*contexts(8), Context("x", "../images/000.png", ("x",))]
    summary = generate(tmp_path / "run", model, ALL, contexts=some, images=images, output=BARE, progress=True)
    assert summary.missing_images == 3 and len(model.asked) == 18
    assert "accepted=18, rejected=0" in capsys.readouterr().err  # the progress bar
    with pytest.raises(ValueError, match="None of the images is in .*relative"):
        generate(tmp_path / "none", model, ALL, contexts=some[-1:], images=images, output=BARE)
    with pytest.raises(OSError, match="image folder .* does not exist"):
        generate(tmp_path / "none", model, ALL, contexts=some, images=tmp_path / "no", output=BARE)
    assert len(model.asked) == 18


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    def reply(messages):
        return "The caption says so." if "number 7 " in messages[-1]["content"] else answer(messages)

    folder = tmp_path_factory.mktemp("whole")
    images, out = make_images(folder / "images"), folder / "run"
    prices = Prices(1.0, 2.0)
    summary = generate(out, Responder(reply), ALL, contexts=contexts(12), images=images, prices=prices)
    return out, summary


def test_datasets_folder_holds_the_data_with_images_in_the_form_that_training_reads(whole_run):
    from modeling_llava.data.schema import from_llava_row, from_messages_row

    out, _ = whole_run
    data = load_dataset(str(out / "dataset"), split="train")
    rows = rows_of(out)
    assert len(data) == len(rows) == 36 and data.column_names == ["id", "images", "messages", "type"]
    for parquet, row in zip(data, rows):
        assert parquet["images"][0].size == (40 + int(row["image"][:3]), 30)
        one, two = from_messages_row({**parquet, "images": [row["image"]]}), from_llava_row(row)
        for conversation in (one, two):  # the line break between image and question is the form's own
            for message in conversation["messages"]:
                for item in message["content"]:
                    if item["type"] == "text":
                        item["text"] = item["text"].strip()
        assert one == two


def test_datasets_cache_does_not_give_the_rows_of_another_run(tmp_path, images):
    for number in (2, 3):
        out = tmp_path / str(number) / "run"
        output = OutputSettings(report_samples=0)
        generate(out, Responder(), COMPLEX, contexts=contexts(number), images=images, output=output)
        data = load_dataset(str(out / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
        assert data["id"][:] == [f"{i:03d}:complex" for i in range(number)]


def test_a_file_that_is_not_an_image_is_left_out_of_the_datasets_folder_with_a_warning(tmp_path, images, caplog):
    (images / "001.png").write_bytes(b"<html>404</html>")
    out = tmp_path / "run"
    settings = OutputSettings(card=False)
    found = generate(out, Responder(), ALL, contexts=contexts(3), images=images, output=settings).output
    data = load_dataset(str(out / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 6 and found.missing_images == 3 and len(rows_of(out)) == 9
    assert len({row["images"][0].size for row in data}) == 2  # every image decodes
    assert (
        caplog.text.count("An image is left out") == 2
    )  # once for the folder, once for the report, not once a sample
    folder = open_run(out)
    with Ledger(out / "ledger.jsonl") as ledger:
        again = write_output(folder, ledger, images=images, settings=BARE)
    assert "is of an earlier call" in again.notes[0]


def test_card_says_what_the_ledger_says(whole_run):
    out, summary = whole_run
    text = (out / "dataset" / "README.md").read_text("utf-8")
    head = text.split("---")[1]
    assert "path: data/train-*-" in head and "image-text-to-text" in head
    figures = json.loads((out / "summary.json").read_text("utf-8"))
    assert figures["samples"] == {"conversation": 12, "detail": 12, "complex": 12}
    assert figures["used"][0] == 100 * summary.ledger.replies
    cost = summary.ledger.replies * (100 * 1.0 + 20 * 2.0) / 1e6
    assert figures["cost_dollars"] == pytest.approx(cost) == summary.cost and f"${cost:,.4f}" in text
    assert summary.ledger.replies == 36 + 3
    assert "| mentions captions, boxes or coordinates | 0 | 1 | 0 |" in text
    assert "| not in the form of questions and answers | 1 | 0 | 1 |" in text
    assert f"| prompts (hash) | `{figures['settings']['prompts']}` |" in text
    assert "| conversation | 12 | 33.3% | 24 |" in text
    assert (out / "dataset" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) not in text and str(out) not in (out / "summary.json").read_text("utf-8")


def test_card_of_a_limited_run_counts_the_contexts_that_were_asked_about(tmp_path, images):
    few = contexts(8)
    few[1] = Context(few[1].id, few[1].image, few[1].captions, few[1].boxes * 3)
    output = OutputSettings(parquet=False, report_samples=0)
    out = tmp_path / "run"
    generate(out, Responder(), ALL, contexts=few, images=images, limit=3, output=output)
    for _ in range(2):  # `llava data report` does not know the limit
        text = (out / "README.md").read_text("utf-8")
        assert "| contexts asked about | 3 |" in text and "| their boxes | 5 |" in text
        assert "| contexts in the captions and boxes given | 8 |" in text
        with Ledger(out / "ledger.jsonl", write=False) as ledger:
            write_output(open_run(out), ledger, images=images, settings=output)


def test_report_is_one_page_with_pictures_and_boxes_to_mark(whole_run):
    out, _ = whole_run
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<article") == 36 and page.count("data:image/jpeg;base64,") == 36
    assert "Balance of types" in page and "http" not in page.replace("<!doctype html>", "")
    for row in rows_of(out):
        assert f'data-id="{row["id"]}"' in page
    # 12 of each type are a third each.
    assert page.count("33.3%") >= 3


def test_report_escapes_what_the_model_wrote(tmp_path):
    bad = 'Question:\nWhy "quotes" & <b>tags</b> here?\n===\nAnswer:\n<script>alert(1)</script>' + " is not good" * 10
    out, output = tmp_path / "run", OutputSettings(parquet=False, card=False)
    generate(out, Responder(lambda m: bad), COMPLEX, contexts=contexts(1), output=output)
    page = (out / "report.html").read_text("utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;tags" in page


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the page's script")
def test_the_reports_script_marks_and_downloads_the_drop_list(whole_run):
    out, _ = whole_run
    harness = Path(__file__).parent / "run_report.js"
    done = subprocess.run(["node", harness, out / "report.html"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "count": 1,
        "classes": {"a:detail": False, "b:complex": True},
        "saved": {"run": open_run(out).id, "drop": ["b:complex"]},
        "name": "drop.json",
    }


def test_samples_in_the_report_are_spread_over_the_types():
    samples = [(f"c{i}", "conversation") for i in range(500)] + [(f"d{i}", "detail") for i in range(5)]
    chosen = choose_samples(samples, 40)
    assert len(chosen) == 40 and sum(name.startswith("d") for name in chosen) == 5
    assert chosen == choose_samples(samples, 40) != choose_samples(samples, 40, seed=1)
    assert choose_samples(samples, 10_000) == {name for name, _ in samples}


@pytest.mark.parametrize("text", ['{"dropped": 3}', '{"drop": [3]}', "["])
def test_drop_list_of_another_form_is_named(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match="d.json is not a drop list"):
        read_drop_list(tmp_path / "d.json")


def test_estimate_counts_what_is_left_without_asking(tmp_path):
    folder = open_folder(tmp_path / "run", ALL, contexts=contexts(5))
    found = estimate(folder, limit=4)
    assert found.tasks == {"conversation": 4, "detail": 4, "complex": 4}
    # Three tenths of a token a character, and four for each message.
    texts = [message["content"] for messages in found.samples.values() for message in messages]
    assert found.usage.prompt_tokens == pytest.approx(4 * (0.3 * sum(map(len, texts)) + 4 * len(texts)), rel=1e-3)
    assert found.most_usage.completion_tokens == 12 * 1024 > found.usage.completion_tokens > 12 * 50
    assert found.samples["detail"][-1]["content"].endswith("thing: [0.1, 0.2, 0.3, 0.4]")
    generate(tmp_path / "run", Responder(), ALL, contexts=contexts(5), limit=4, output=BARE)
    assert estimate(folder, limit=4).tasks.total() == 0 and estimate(folder).tasks.total() == 3


def test_a_disk_too_small_for_the_images_leaves_the_rest_whole(tmp_path, images, monkeypatch):
    from modeling_llava.data_engine import output

    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    settings = OutputSettings(card=False)
    summary = generate(tmp_path / "run", Responder(), ALL, contexts=contexts(3), images=images, output=settings)
    assert len(rows_of(tmp_path / "run")) == 9 and not (tmp_path / "run" / "dataset").exists()
    assert "0.0 GB are free" in summary.output.notes[0]
