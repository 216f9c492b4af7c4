"""A run that a test kills: what its process does. Apart from the test, so that the process starts quickly."""

from modeling_llava.data_engine.contexts import Context
from modeling_llava.data_engine.generate import generate
from modeling_llava.data_engine.run import GenerateConfig
from modeling_llava.data_engine.samples import OutputSettings
from modeling_llava.endpoint import Backoff, OpenAIModel, RunSettings


CONFIG = GenerateConfig("tiny", mix=(1, 1, 1))


def contexts(number):
    return [Context(f"{i:06d}", f"{i:06d}.jpg", (f"a red thing number {i} on a table",)) for i in range(number)]


def live(out, url, number, concurrency):
    return generate(
        out,
        OpenAIModel("tiny", base_url=url),
        CONFIG,
        contexts=contexts(number),
        settings=RunSettings(concurrency, backoff=Backoff(first=0.01, longest=0.1)),
        output=OutputSettings(question_repeats=None, parquet=False, card=False, report_samples=0),
    )
