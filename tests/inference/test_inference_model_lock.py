"""Predictors over one model, in threads: while one computes, the model is not the others' to use."""

import copy
import threading

import pytest
import torch
from tiny_predictor import QUESTIONS, generated, picture, tiny_llava, user_turn

from modeling_llava.inference import model_lock
from modeling_llava.inference.predictor import LlavaPredictor


@pytest.fixture
def model(processor):
    return tiny_llava(processor)


def test_a_predictor_that_is_made_while_another_answers_does_not_disturb_it(model, processor):
    predictor = LlavaPredictor(model, processor, max_cached_images=0)
    answer = generated(model, processor, [user_turn(QUESTIONS[0], [picture(1)])])
    before = model.model.language_model.config._attn_implementation
    begun, other = threading.Event(), threading.Event()

    def in_the_middle(module, args, kwargs):
        """Of the pass with which a new predictor tries the model: give the other one time to begin as well."""
        if threading.current_thread() is making:
            begun.set()
            other.wait(0.5)
        else:
            other.set()

    made = []
    making = threading.Thread(target=lambda: made.append(LlavaPredictor(model, processor)))
    hook = model.model.language_model.layers[0].register_forward_pre_hook(in_the_middle, with_kwargs=True)
    making.start()
    assert begun.wait(300)
    predictor.set_image(picture(1))
    assert predictor.ask(QUESTIONS[0], max_new_tokens=12) == answer
    making.join()
    hook.remove()
    assert made[0].decoder.shares_prefixes
    assert model.model.language_model.config._attn_implementation == before
    assert generated(model, processor, [user_turn(QUESTIONS[0], [picture(1)])]) == answer


def test_predictors_in_threads_give_the_answers_of_one_alone(model, processor):
    def answers(number):
        predictor = LlavaPredictor(model, processor)
        predictor.set_image(picture(number))
        return predictor.ask(QUESTIONS, max_new_tokens=12), predictor.ask(QUESTIONS[0], max_new_tokens=12)

    alone = [answers(number) for number in range(4)]
    together: list = [None] * 4
    threads = [
        threading.Thread(target=lambda number=number: together.__setitem__(number, answers(number)))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_whoever_uses_the_model_beside_predictors_can_take_a_turn(model, processor):
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    answers = []
    asking = threading.Thread(target=lambda: answers.append(predictor.ask(QUESTIONS[0], max_new_tokens=4)))
    with model_lock(model):
        asking.start()
        asking.join(0.2)
        assert asking.is_alive() and not answers
        text = generated(model, processor, [user_turn(QUESTIONS[0], [picture(1)])], 4)
    asking.join()
    assert answers == [text]


def test_an_adapter_and_its_base_take_turns_too(model, processor):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert model_lock(adapted) is model_lock(model)
    with torch.device("meta"):
        other = tiny_llava(processor)
    assert model_lock(other) is not model_lock(model)


def test_a_predictor_can_be_copied_with_its_model(model, processor):
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    answer = predictor.ask(QUESTIONS[0], max_new_tokens=4)
    copied = copy.deepcopy(predictor)
    assert copied.model is not model and model_lock(copied.model) is not model_lock(model)
    assert copied.ask(QUESTIONS[0], max_new_tokens=4) == answer


def test_an_answer_closed_or_broken_by_an_error_in_a_thread_leaves_the_turn_to_others(model, processor):
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    answer = predictor.ask(QUESTIONS[0], max_new_tokens=4)

    def fail(*_):
        raise RuntimeError("out of memory")

    def broken():
        stream = predictor.stream(QUESTIONS[0])
        next(stream)
        hook = model.model.language_model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            next(stream)
        hook.remove()
        begun.append(predictor.stream(QUESTIONS[0]))
        next(begun[0])

    begun: list = []
    thread = threading.Thread(target=broken)
    thread.start()
    thread.join()
    begun.pop().close()  # begun in a thread that has ended
    assert predictor.last_answer.finish_reason == "broken off"
    assert model_lock(model).acquire(timeout=5)
    model_lock(model).release()
    assert predictor.ask(QUESTIONS[0], max_new_tokens=4) == answer
    assert generated(model, processor, [user_turn(QUESTIONS[0], [picture(1)])], 4) == answer
