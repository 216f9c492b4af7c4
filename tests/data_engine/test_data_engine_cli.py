"""The command lines of the data engine, as a person types them."""

import json

import pytest
from fault_server import FaultServer, answer
from PIL import Image

from modeling_llava.cli.main import main


pytest.importorskip("openai")


@pytest.fixture
def files(tmp_path):
    """COCO captions, instances and images."""
    images = [{"id": i, "file_name": f"{i:03d}.png", "width": 40, "height": 30} for i in range(5)]
    captions = [{"id": i, "image_id": i, "caption": f"a thing number {i} on a table"} for i in range(5)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [4, 3, 8, 6]} for i in range(5)]
    coco = {"images": images, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "instances.json").write_text(json.dumps({**coco, "annotations": boxes}))
    (tmp_path / "images").mkdir()
    for image in images:
        Image.new("RGB", (40, 30), "teal").save(tmp_path / "images" / image["file_name"])
    return tmp_path


def line(folder, *more):
    words = f"data generate --captions {folder}/captions.json --boxes {folder}/instances.json --images {folder}/images"
    return [*words.split(), "--out", str(folder / "run"), "--model", "tiny", "--mix", "1:1:1", *more]


def test_generate_by_the_contracts_line_and_resumed_by_the_same(files, monkeypatch, capsys):
    with FaultServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "the key")
        options = ["--types", "conversation,complex", "--concurrency", "3", "--limit", "4", "--no-parquet"]
        assert main(line(files, *options)) == 0
        assert sum(server.asked.values()) == 8 and server.headers[0]["authorization"] == "Bearer the key"
        out = capsys.readouterr().out
        assert "8 replies accepted, 0 rejected" in out and "8 conversations about 4 images" in out
        assert main(line(files, *options)) == 0
        assert sum(server.asked.values()) == 8
        assert "8 were settled earlier" in capsys.readouterr().out
    assert len(json.loads((files / "run" / "instruct.json").read_text())) == 8


def test_dry_run_asks_nobody_and_prints_the_estimate_and_three_whole_prompts(files, capsys):
    more = ["--base-url", "http://127.0.0.1:9/v1", "--dry-run", "--price-in", "10", "--price-out", "30"]
    assert main(line(files, *more)) == 0
    out = capsys.readouterr().out
    for kind in ("conversation", "detail", "complex"):
        assert f"══ {kind} " in out
    assert out.count("── system\n") == 3 and out.count("thing: [0.1, 0.1, 0.3, 0.3]") == 2
    assert "15 requests: 5 conversation, 5 detail, 5 complex" in out and "about $" in out and "as batches" in out


def test_a_budget_that_runs_out_and_an_endpoint_that_is_down_have_exit_codes(files, capsys):
    with FaultServer() as server:
        more = ["--base-url", server.url, "--no-parquet", "--concurrency", "1"]
        assert main(line(files, *more, "--max-tokens", "8000")) == 3
        assert 1 <= sum(server.asked.values()) < 15
    assert "The same command resumes" in capsys.readouterr().err
    assert main(line(files, *more[:1], "http://127.0.0.1:9/v1", "--patience", "0.2")) == 1
    assert "stopped: The endpoint has given no reply for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max-cost", "5"], "--price-in and --price-out"),
        (["--mix", "58-23-77"], "--mix must be three numbers"),
        (["--mix", "nan:1:1"], "three numbers"),
        (["--types", "poem"], "conversation, detail, complex, got poem"),
        (["--language", "tlh"], "'tlh' cannot be recognised"),
        (["--temperature", "hot"], "--temperature must be a number"),
        (["--temperature", "nan"], "temperature must be 0 or more, got nan"),
        (["--captions", "absent.json"], "absent.json does not exist"),
        (["--images", "absent"], "image folder absent does not exist"),
        (["--prompts", "absent"], "system_message.txt does not exist"),
        (["--base-url", "localhost:8000"], "http://localhost:8000"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--question-repeats", "0"], "--question-repeats must be"),
        (["--samples", "-1"], "--samples must be 0"),
        (["--max-boxes", "-1"], "max_boxes must be 0 or more, got -1"),
        (["--max-reply-tokens", "0"], "max_reply_tokens must be 1 or more, got 0"),
        (["--patience", "nan"], "patience"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(files, capsys, more, message):
    base = ["--base-url", "http://127.0.0.1:9/v1"]
    assert main(line(files, *base, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_report_makes_the_data_again_without_what_was_marked(files, capsys):
    drop = files / "drop.json"
    drop.write_text(json.dumps({"drop": ["001:detail", "002:complex"]}))
    with FaultServer() as server:
        assert main(line(files, "--base-url", server.url)) == 0
        assert main(["data", "report", str(files / "run"), "--drop", str(drop), "--samples", "4"]) == 0
        names = [row["id"] for row in json.loads((files / "run" / "instruct.json").read_text())]
        assert len(names) == 13 and not {"001:detail", "002:complex"} & set(names)
        assert (files / "run" / "report.html").read_text().count("<article") == 4
        # What was dropped stays dropped, also in later runs of the same command.
        assert main(line(files, "--base-url", server.url)) == 0
        assert sum(server.asked.values()) == 15
    assert len(json.loads((files / "run" / "instruct.json").read_text())) == 13
    assert main(["data", "report", str(files)]) == 2


def test_batches_give_the_data_of_live_requests_at_half_the_price(files, capsys):
    batch = files / "batches" / "batch-000.jsonl"
    assert main(line(files, "--batch-out", str(batch.parent))) == 0
    assert "15 requests in 1 files" in capsys.readouterr().out
    results = []
    for text in batch.read_text().splitlines():
        request = json.loads(text)
        usage = {"prompt_tokens": 100, "completion_tokens": 20}
        body = {"choices": [{"message": {"content": answer(request["body"]["messages"])}}], "usage": usage}
        results.append(json.dumps({"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}))
    (files / "results.jsonl").write_text("\n".join(reversed(results[:10])))
    options = ["--no-parquet", "--price-in", "1000", "--price-out", "2000"]
    assert main(line(files, "--batch-in", str(files / "results.jsonl"), *options)) == 0
    assert "10 results read: 10 accepted" in capsys.readouterr().out
    figures = json.loads((files / "run" / "summary.json").read_text())
    assert figures["cost_dollars"] == pytest.approx(10 * (100 + 2 * 20) / 1000 / 2)
    assert main(line(files, "--batch-forget")) == 0
    assert "5 requests can be asked again" in capsys.readouterr().out
    with FaultServer() as server:
        assert main(line(files, "--base-url", server.url, "--no-parquet")) == 0
        assert len(server.asked) == 5
        live = line(files, "--base-url", server.url, "--no-parquet", "--out", str(files / "live"))
        assert main(live) == 0
    assert (files / "run" / "instruct.json").read_bytes() == (files / "live" / "instruct.json").read_bytes()


REFUSED = 400, {"error": {"message": "temperature stays at its default here."}}


def test_settings_may_change_until_something_is_answered_and_the_endpoints_words_are_shown(files, capsys):
    more = ["--no-parquet", "--types", "detail", "--limit", "2"]
    with FaultServer(reply=lambda messages: REFUSED) as server:
        assert main(line(files, *more, "--base-url", server.url)) == 1
        assert "temperature stays at its default here." in capsys.readouterr().out
    with FaultServer() as server:
        assert main(line(files, *more, "--base-url", server.url, "--temperature", "default")) == 0
        assert main(line(files, *more, "--base-url", server.url)) == 2
        assert "temperature was None and is 0.7" in capsys.readouterr().err


def test_a_run_without_an_accepted_reply_ends_with_another_code_than_0(files, capsys):
    with FaultServer(reply=lambda messages: "I'm sorry, I can't.") as server:
        for _ in range(2):
            assert main(line(files, "--base-url", server.url, "--types", "detail")) == 1
    assert "no reply was accepted" in capsys.readouterr().err
    assert len((files / "run" / "rejected.jsonl").read_text().splitlines()) == 2 * 5


def test_a_batch_that_is_refused_as_a_whole_shows_why_and_binds_nobody(files, capsys):
    assert main(line(files, "--batch-out", str(files / "batches"))) == 0
    assert main(line(files, "--temperature", "default", "--dry-run")) == 2  # it waits
    requests = (files / "batches" / "batch-000.jsonl").read_text().splitlines()
    response = {"status_code": REFUSED[0], "body": REFUSED[1]}
    refused = [json.dumps({"custom_id": json.loads(text)["custom_id"], "response": response}) for text in requests]
    (files / "errors.jsonl").write_text("\n".join(refused))
    assert main(line(files, "--batch-in", str(files / "errors.jsonl"))) == 1
    assert "temperature stays at its default here." in capsys.readouterr().out
    assert main(line(files, "--temperature", "default", "--dry-run")) == 0


def test_dry_run_counts_boxes_that_are_left_out(files, capsys):
    coco = json.loads((files / "instances.json").read_text())
    coco["annotations"][0].pop("bbox")
    coco["annotations"][1]["iscrowd"] = coco["annotations"][2]["iscrowd"] = 1
    (files / "instances.json").write_text(json.dumps(coco))
    assert main(line(files, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "1 × annotation without a bbox" in out and "2 × box around a crowd" in out


def test_expand_and_filter_by_command(tmp_path, capsys):
    rows = [{"image": f"{i}.jpg", "caption": "a red bus" if i % 2 else f"a thing{i}"} for i in range(10)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    assert main(["data", "expand", str(tmp_path / "in.json"), str(tmp_path / "out.json"), "--style", "plain"]) == 0
    assert "10 samples of 10 rows" in capsys.readouterr().out
    pytest.importorskip("spacy")
    code = main(["data", "filter", str(tmp_path / "in.json"), str(tmp_path / "few.json"), "--workers", "1"])
    captured = capsys.readouterr()
    if "is not installed" in captured.err:
        pytest.skip(captured.err)
    assert code == 0 and "5 of 10 captions" in captured.out
    assert len(json.loads((tmp_path / "few.json").read_text())) == 5
