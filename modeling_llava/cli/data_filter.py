"""`llava data filter IN OUT`: the concept-balanced choice of captions."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Choose captions so that rare and common concepts are balanced (LLaVA, appendix): noun phrases by spaCy, those of "
        "fewer than --least captions skipped, from the rarest up all captions that hold one, at most --most per phrase. "
        "Beside OUT.json lie OUT.report.json, OUT.concepts.png and OUT.phrases/, from which a stopped call goes on."
    )
    parser.add_argument("source", metavar="IN.json", help="COCO captions, LLaVA's JSON, or {image, caption} rows")
    parser.add_argument(
        "target", metavar="OUT.json", help="the chosen rows, as they stand in IN; JSON, or JSONL by its name"
    )
    parser.add_argument("--least", type=int, default=3, help="skip phrases of fewer captions (default: %(default)s)")
    parser.add_argument("--most", type=int, default=100, help="most captions per phrase (default: %(default)s)")
    parser.add_argument(
        "--target-size", type=int, metavar="N", help="stop with the phrase at which N captions are chosen"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random part (default: %(default)s)")
    parser.add_argument("--spacy-model", default="en_core_web_sm", help="spaCy's model (default: %(default)s)")
    parser.add_argument("--phrases", metavar="DIR", help="where noun phrases are kept (default: OUT.phrases)")
    parser.add_argument("--workers", type=int, help="processes that look for noun phrases (default: one per core)")
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="'ray': Ray Data, on a cluster (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from ..data_engine.captions import filter_captions
    from ..data_engine.concepts import ConceptSettings

    settings = ConceptSettings(args.least, args.most, args.seed, args.target_size)
    summary = filter_captions(
        args.source,
        args.target,
        settings,
        model=args.spacy_model,
        phrases=args.phrases,
        workers=args.workers,
        engine=args.engine,
        progress=True,
    )
    target = Path(args.target)
    print(f"{args.target}: {summary.chosen:,} of {summary.captions:,} captions ({summary.rows_chosen:,} rows)")
    print(
        f"noun phrases: {summary.phrases:,} before, {summary.phrases_after:,} after; {summary.skipped:,} rarer than "
        f"{args.least} skipped, {summary.capped:,} cut to {args.most} captions"
    )
    print(
        f"report: {target.with_name(target.stem + '.report.json')}, {target.with_name(target.stem + '.concepts.png')}"
    )
    print(f"next: llava data expand {args.target} STAGE1.json")
    return 0
