"""How a language model behind an endpoint is asked: the options of `llava data generate` and of the judges."""

import argparse


def add_endpoint_arguments(
    parser: argparse.ArgumentParser,
    *,
    concurrency: int = 8,
    patience: float = 120,
    max_reply_tokens: int | None = None,
) -> None:
    """Adds the options, with the command's defaults; `max_reply_tokens=None` is the benchmark's."""
    group = parser.add_argument_group("the endpoint (its key: OPENAI_API_KEY)")
    add = group.add_argument
    add("--base-url", metavar="URL", help="OpenAI-compatible endpoint (default: OPENAI_BASE_URL, or OpenAI)")
    add("--concurrency", type=int, default=concurrency, metavar="N", help="requests in flight (default: %(default)s)")
    longest = f"longest reply, thoughts included (default: {max_reply_tokens or 'of the benchmark'})"
    add("--max-reply-tokens", "--review-tokens", type=int, default=max_reply_tokens, metavar="N", help=longest)
    name = "the endpoint's name for the longest reply; the second is used if it asks for it (default: %(default)s)"
    names = ("max_tokens", "max_completion_tokens")
    add("--length-parameter", choices=names, default="max_tokens", help=name)
    add("--requests-per-minute", type=float, metavar="N", help="limit of requests")
    add("--tokens-per-minute", type=float, metavar="N", help="limit of tokens, prompts and longest replies")
    add("--timeout", type=float, default=120, metavar="S", help="seconds for one reply (default: %(default)g)")
    add("--patience", type=float, default=patience, metavar="S", help="seconds without a reply (default: %(default)g)")
    add("--max-tokens", type=int, metavar="N", help="budget: tokens of the whole run")
    add("--max-cost", type=float, metavar="USD", help="budget: dollars of the whole run; needs prices")
    add("--price-in", type=float, default=0.0, metavar="USD", help="dollars per million prompt tokens")
    add("--price-out", type=float, default=0.0, metavar="USD", help="dollars per million reply tokens")


def temperature(text: str) -> float | None:
    """A temperature as an argument; `None` for `default`, the endpoint's."""
    return None if text == "default" else float(text)


def make_chat_model(args: argparse.Namespace, name: str, optional=("temperature", "seed"), **options):
    """The language model `name` at the endpoint; `options` are those of `OpenAIModel`."""
    from ..endpoint import OpenAIModel

    options |= {"base_url": args.base_url, "timeout": args.timeout, "length_parameter": args.length_parameter}
    return OpenAIModel(name, optional=optional, **options)


def prices(args: argparse.Namespace):
    """The prices of the arguments as `Prices`."""
    from ..endpoint import Prices

    return Prices(args.price_in, args.price_out)


def run_settings(args: argparse.Namespace, **more):
    """The limits of the arguments as `RunSettings`."""
    from ..endpoint import Backoff, RunSettings

    backoff = Backoff(patience=args.patience)
    return RunSettings(args.concurrency, args.requests_per_minute, args.tokens_per_minute, backoff, **more)


def asking_options(args: argparse.Namespace) -> dict:
    """Limits and budget, for [`ask_all`]."""
    from ..endpoint import Budget

    return {"settings": run_settings(args), "budget": Budget(args.max_tokens, args.max_cost, prices(args))}
