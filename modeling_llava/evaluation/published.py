"""Published results that ours are printed beside, in percent. Checked against the text of the papers."""

SCIENCEQA_COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average")
"""Subject (natural, social, language science), context (text, image, none), grade, and all questions."""

SCIENCEQA = {
    "Human": (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40),
    "GPT-3.5": (74.64, 69.74, 76.00, 74.44, 67.28, 77.42, 76.80, 68.89, 73.97),
    "GPT-3.5 with CoT": (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17),
    "LLaMA-Adapter": (84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05, 85.19),
    "MM-CoT base": (87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37, 84.91),
    "MM-CoT large": (95.91, 82.00, 90.82, 95.26, 88.80, 92.89, 92.44, 90.31, 91.68),
    "GPT-4, text only": (84.06, 73.45, 87.36, 81.87, 70.75, 90.73, 84.69, 79.10, 82.69),
    "LLaVA-13B": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "LLaVA-13B + GPT-4, complement": (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97),
    "LLaVA-13B + GPT-4, judge": (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53),
}
"""Test split. LLaVA (Liu et al., 2023), Table 7."""

SCIENCEQA_ABLATIONS = {
    "best variant": 90.92,
    "last layer's features": 89.96,
    "answer before reasoning": 89.77,
    "no pretraining": 85.81,
    "7B": 89.84,
}
"""Average on the test split. LLaVA, Table 8."""

LLAVA_BENCH_COLUMNS = ("conv", "detail", "complex", "all")

LLAVA_BENCH_COCO = {
    "LLaVA-13B": (83.1, 75.3, 96.5, 85.1),
    "detail and complex only": (81.5, 73.3, 90.8, 81.9),
    "conversation only": (76.5, 59.8, 84.9, 73.8),
    "no instruction tuning": (22.0, 24.0, 18.5, 21.5),
}
"""Relative to text-only GPT-4, which saw captions and boxes; judge: GPT-4 (March 2023). LLaVA, Table 4."""

LLAVA_BENCH_WILD = {
    "OpenFlamingo": (19.3, 19.0, 19.1, 19.1),
    "BLIP-2": (54.6, 29.1, 32.9, 38.1),
    "LLaVA-13B": (57.3, 52.5, 81.7, 67.3),
}
"""Means of three runs. LLaVA, Table 5."""
