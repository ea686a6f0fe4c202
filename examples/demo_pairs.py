"""Makes the pairs of `tether demo`: a model's own answers, the first sentence preferred to all of it.

    python examples/demo_pairs.py MODEL_FOLDER OUTPUT_FOLDER

Asks about each topic below, greedily, in batches (SmolLM2-135M-Instruct on two cores: about six minutes). Needs no one
to label anything: the chosen answer is short, the rejected one is what the model says today. Rows whose first sentence
is no answer by itself are left out. Writes `train.jsonl` and `held_out.jsonl`.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, LONGEST, NUM_HELD_OUT = 32, 72, 64

TOPICS = {
    "What is {}?": """
        a volcano; a comet; a glacier; an earthquake; a rainbow; a desert; a coral reef; a black hole; an
        island; a waterfall; a tornado; a delta; a canyon; a fossil; a galaxy; a planet; a star; a tide; a
        cloud; an avalanche; a compass; a telescope; a microscope; a bicycle; a violin; a piano; a drum; a
        clock; a lighthouse; a bridge; a castle; a windmill; a submarine; a sailing boat; a parachute; a
        battery; a magnet; a thermometer; a camera; a printing press; a library; a museum; a novel; a poem; a
        symphony; a fable; a sonnet; an orchestra; an opera; a democracy; a constitution; a treaty; inflation;
        a budget; a loan; insurance; a stock; a tax; a market; a prime number; a fraction; a triangle; an
        average; a percentage; a proof; an atom; a molecule; an acid; a metal; a gas; a cell; a gene; a
        protein; a vitamin; a virus; a vaccine; a bacterium; a mammal; a reptile; an insect; a penguin; a
        dolphin; an octopus; a bat; a spider; a mushroom; a cactus; a seed; honey; bread; cheese; yoghurt;
        tea; chocolate; rice; olive oil; vinegar; a haiku; a sundial; a satellite; an eclipse
    """,
    "How does {} work?": """
        a refrigerator; a microwave oven; a toaster; a light bulb; a solar panel; a wind turbine; a steam
        engine; an electric motor; a jet engine; a rocket; a helicopter; an elevator; a zipper; a lock; a
        pencil; a pump; a siphon; a lever; a pulley; a mirror; a lens; a radio; a telephone; a keyboard; a
        barcode; a search engine; a computer; a vacuum cleaner; a washing machine; a sewing machine; a traffic
        light; a dam; a sail; the heart; the eye; the ear; digestion; memory; sleep; photosynthesis;
        evolution; gravity; recycling; composting; a credit card; a lottery; an auction; an election; a jury;
        a calendar; a map; a dictionary; a translation; soap; yeast; salt; a candle; fire; paint; glue
    """,
    "Why {}?": """
        is the sky blue; is the sea salty; do leaves change colour; do birds migrate; do cats purr; do dogs
        bark; do bees make honey; do we yawn; do we dream; do we laugh; do we get tired; do we have seasons;
        do stars twinkle; does ice float; does metal rust; does bread rise; do onions make us cry; do
        volcanoes erupt; do boats float; do planes fly; do we need water; do we need sleep; do plants need
        light; is exercise healthy; is reading useful; is history important; is money useful; are forests
        important; are insects important; do people travel; do people sing; do people keep pets; do we brush
        our teeth; do we wash our hands; do we cook food; do people drink coffee; does the moon shine; do
        rivers flow; do magnets attract; do zebras have stripes
    """,
    "How can I {}?": """
        sleep better; learn a language; save money; make a good cup of tea; boil an egg; bake bread; cook
        rice; grow tomatoes; keep a plant alive; train a puppy; calm a crying baby; stop procrastinating;
        write a letter; give a speech; make new friends; remember names; read more books; run faster; stretch
        safely; learn to swim; learn to draw; learn the guitar; take better photos; pack a suitcase; plan a
        trip; clean a window; remove a stain; fix a flat tyre; save water; save electricity; reduce waste;
        prepare for an exam; prepare for an interview; ask for help; say sorry; choose a book; choose a
        bicycle; tidy my desk; wake up earlier; eat more vegetables
    """,
    "What do {} do?": """
        teachers; nurses; farmers; bakers; plumbers; electricians; carpenters; architects; engineers; lawyers;
        judges; journalists; librarians; pilots; sailors; firefighters; astronauts; chemists; biologists;
        historians; translators; musicians; painters; actors; tailors; butchers; gardeners; dentists;
        surgeons; vets
    """,
    "Tell me about {}.": """
        the sun; the moon; Mars; the Nile; the Alps; the Amazon; Antarctica; the Sahara; Japan; Brazil; Egypt;
        Iceland; Rome; Paris; Istanbul; the Great Wall of China; the Roman Empire; the Vikings; the
        Renaissance; the steam age; elephants; whales; owls; wolves; turtles; horses; apples; potatoes;
        coffee; cotton; chess; football; the Olympic Games; jazz; ballet; origami; pottery; weaving; the
        alphabet; paper
    """,
}


def main(model_name: str, output_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    questions = [form.format(" ".join(topic.split())) for form, topics in TOPICS.items() for topic in topics.split(";")]
    random.Random(0).shuffle(questions)
    rows: list[dict[str, object]] = []
    for start in range(0, len(questions), BATCH):
        asked = questions[start : start + BATCH]
        rows += filter(None, map(pair_of, asked, answers_of(model, tokenizer, asked)))
        print(f"{start + len(asked)} of {len(questions)} questions, {len(rows)} pairs", flush=True)
    for name, part in (("held_out", rows[:NUM_HELD_OUT]), ("train", rows[NUM_HELD_OUT:])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (Path(output_folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def answers_of(model: torch.nn.Module, tokenizer: object, questions: list[str]) -> list[str]:
    """The most likely answer to each question, of at most `LONGEST` tokens."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    return tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def pair_of(question: str, answer: str) -> dict[str, object] | None:
    """The first sentence preferred to all whole ones; None if it has not 6 to 30 words, or there is no second."""
    sentences = re.findall(r"[^.!?]+[.!?]+(?=\s|$)", answer.strip())
    first = sentences[0].strip() if sentences else ""
    if len(sentences) < 2 or "\n" in first or not 6 <= len(first.split()) <= 30:
        return None
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": first}],
        "rejected": [{"role": "assistant", "content": "".join(sentences).strip()}],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
