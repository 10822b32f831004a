"""Planted defects: one small edit each, and the test that must notice it. The list shows what the suite is worth.

`catcher` is either pytest arguments or `chaos RUNS SEED`. `old` stands exactly once in its file; a test sees to that, so that the list cannot rot.
"""

# ruff: noqa: E501  # one defect, one line: a table reads better than a form

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """Replace `old` by `new` in `file`; `catcher` must fail then."""

    name: str
    area: str
    file: str
    old: str
    new: str
    catcher: str


def _transcript(*numbers: str) -> str:
    return f"tests/test_transcripts.py -k {'_or_'.join(numbers)}".replace("_or_", " or ")


_FUZZ = "tests/fuzz"
_CLI = "reranker_worker/cli.py"
_STDIO = "reranker_worker/stdio.py"
_STREAMS = "reranker_worker/streams.py"
_FRAMING = "reranker_worker/protocol/framing.py"
_PARSING = "reranker_worker/protocol/parsing.py"
_ANSWERS = "reranker_worker/protocol/answers.py"
_WORKER = "reranker_worker/worker.py"
_DESK = "reranker_worker/desk.py"
_ADMISSION = "reranker_worker/admission.py"
_SCHEDULER = "reranker_worker/scheduler.py"
_JOBS = "reranker_worker/jobs.py"
_PACE = "reranker_worker/pace.py"
_SHARING = "reranker_worker/sharing.py"
_ORDERING = "reranker_worker/ordering.py"
_FLEET = "reranker_worker/engine/fleet.py"
_HANDLE = "reranker_worker/engine/handle.py"
_RESTARTS = "reranker_worker/engine/restarts.py"
_SCORING = "reranker_worker/engine/scoring.py"
_CHILD = "reranker_worker/engine/child.py"
_CREW = "reranker_worker/engine/crew.py"
_FRAMES = "reranker_worker/engine/frames.py"
_QUARANTINE = "reranker_worker/quarantine.py"
_PACKING = "reranker_worker/backends/packing.py"
_ENCODER = "reranker_worker/backends/encoder.py"
_GRAPH = "reranker_worker/backends/onnx_graph.py"
_CHOOSING = "reranker_worker/backends/choosing.py"
_ARTEFACTS = "reranker_worker/models/artefacts.py"
_CALIBRATION = "reranker_worker/prewarm/calibration.py"
_MAKING = "reranker_worker/prewarm/making.py"
_START = "tests/process/test_start.py"
_ONNX = "tests/backends/test_onnx.py"
_PREWARM = "tests/prewarm"

DEFECTS = [
    # --- transport
    Defect("a short write drops the rest of the line", "transport", _STREAMS, "line = line[written:]", "line = line[len(line) :]", "tests/process -k non_blocking"),
    Defect("answers of one turn leave in reverse", "transport", _STREAMS, "self._lines.extend(lines)", "self._lines.extend(reversed(lines))", _transcript("09_", "15_")),
    Defect("stdout is not claimed", "transport", _STREAMS, "    os.dup2(2, 1)\n", "", "tests/process -k noise"),
    Defect("end of input is not noticed", "transport", _STDIO, "self._worker.end_of_input(now)", "pass", _transcript("01_")),
    Defect("SIGTERM keeps its default", "transport", _STDIO, "(signal.SIGTERM, signal.SIGHUP):", "(signal.SIGHUP,):", _transcript("17_")),
    Defect("the worker leaves before the last answers are written", "transport", _STDIO, "if self._writer.flush(_FLUSH_STEP_SECONDS):", "if True:", "tests/process -k last_answers"),
    Defect("the host's death is not watched", "transport", _STDIO, "watch(self._parent.fd, select.POLLIN, self._on_parent)", "pass", "tests/process -k host_was_killed"),
    # --- framing
    Defect("an unfinished line is forgotten at a cut", "framing", _FRAMING, "        self._hold(rest)\n        return lines", "        return lines", "chaos 20 1"),
    Defect("an oversize line takes the next one with it", "framing", _FRAMING, "self._parts, self._held_bytes, self._oversize = [], 0, False", "self._parts, self._held_bytes = [], 0", _transcript("11_")),
    Defect("blank lines are answered", "framing", _FRAMING, r'return [line] if line.strip(b" \t\r") else []', "return [line]", _transcript("11_")),
    Defect("the limit of a line is one byte short", "framing", _FRAMING, "if oversize or len(line) > self._max_line_bytes:", "if oversize or len(line) >= self._max_line_bytes:", _FUZZ),
    Defect("inner frames are read twice", "framing", _FRAMES, "        del self._buffer[:start]\n", "", _transcript("01_")),
    # --- parsing
    Defect("depth is counted one off", "parsing", _PARSING, "if depth > MAX_DEPTH:", "if depth >= MAX_DEPTH:", _FUZZ),
    Defect("true is an id", "parsing", _PARSING, "(type(value) is int and abs(value) < MAX_ID_INTEGER)", "(isinstance(value, int) and abs(value) < MAX_ID_INTEGER)", _FUZZ),
    Defect("pairs of another query join the first group", "parsing", _PARSING, "if not runs or runs[-1][0] != pair[0]:", "if not runs:", _transcript("05_")),
    Defect("a line that is cut off at the end of input is dropped", "parsing", _PARSING, "        for line in self._lines.finish():", "        for line in []:", _transcript("18_")),
    # --- admission
    Defect("a duplicate id is admitted", "admission", _DESK, "return request_id is not None and request_id in self._by_id", "return False", _transcript("02_")),
    Defect("a draining worker admits", "admission", _WORKER, "        if self.draining:\n            self._desk.refuse", "        if False:\n            self._desk.refuse", _transcript("15_")),
    Defect("the queue has no limit", "admission", _ADMISSION, "if max(excess) <= 0 or not scheduler.waiting_jobs:", "if True:", _transcript("12_")),
    Defect("a poisoned request is tried again and again", "admission", _QUARANTINE, "return self._until.get(self._fingerprint(groups), 0.0) > now", "return False", _transcript("13_")),
    # --- ordering
    Defect("answers without id leave when they are done", "ordering", _ORDERING, "        return lines", "        return [line]", _transcript("03_")),
    Defect("refused lines overtake", "ordering", _WORKER, "self._desk.error(message, self._desk.place(message.id))", "self._desk.error(message)", _transcript("03_")),
    Defect("a cancelled request stays in the queue", "ordering", _WORKER, "        for job in jobs or ():\n            self.scheduler.drop(job)\n", "", _transcript("09_")),
    Defect("of equal scores the last comes first", "ordering", _ANSWERS, "(-item[1], item[0])", "(-item[1], -item[0])", _transcript("04_")),
    # --- scheduling
    Defect("a large request keeps its turn", "scheduling", _SCHEDULER, "self._rotations[job.priority].rotate(-1)", "pass", "tests/test_scheduler.py"),
    Defect("one length keeps its turn", "scheduling", _SCHEDULER, "            self._rotations[head.priority].rotate(-1)\n", "", "tests/test_scheduler_narrow.py"),
    Defect("a request of little more than a batch is sent in two", "scheduling", _SCHEDULER, "_SHORT, _LONG = 2.0, 4.0", "_SHORT, _LONG = 1.0, 1.0", "tests/test_scheduler_packed.py"),
    Defect("a long request that fits a batch is cut into parts", "scheduling", _SCHEDULER, "(_LONG if self.pace.parallel > 1 else _SHORT) * target", "_SHORT * target", "tests/test_scheduler_packed.py"),
    Defect("a long batch is not overtaken where one thread takes it whole", "scheduling", _SCHEDULER, "(_LONG if self.pace.parallel > 1 else _SHORT) * target", "_LONG * target", "tests/test_scheduler_packed.py"),
    Defect("how many passes run side by side is forgotten", "scheduling", _WORKER, '        self.scheduler.pace.parallel = int(event.info.get("parallel_passes", 1))\n', "", "tests/test_worker_engines.py"),
    Defect("a long request waits for parts of a longer one", "scheduling", _SCHEDULER, "_OVERTAKE_PART, _OVERTAKE_LONG = 4, 2", "_OVERTAKE_PART, _OVERTAKE_LONG = 4, 4", "tests/test_scheduler_packed.py"),
    Defect("a long request takes the room of short ones", "scheduling", _SCHEDULER, "is_long = is_long and (is_part or tokens > short)", "is_long = is_part", "tests/test_scheduler_packed.py"),
    Defect("a whole request waits for a part of a long one", "scheduling", _SCHEDULER, "budget = min(budget, self.pace.pass_tokens)", "pass", "tests/test_scheduler_packed.py"),
    Defect("a worse priority overtakes a part of a long request", "scheduling", _SCHEDULER, "is_part or head.priority > min(self._long_priorities.values(), default=head.priority)", "is_part", "tests/test_scheduler_packed.py"),
    Defect("nothing overtakes a part of a long request", "scheduling", _JOBS, "(self.overtaken + 1 if self.overtaken else 0)", "0", "tests/engine/test_fleet.py"),
    Defect("parts of a long request take the room of whole ones", "scheduling", _FLEET, "sum(not batch.long for batch in batches) >= _MOST_SHORT", "len(batches) >= _MOST_SHORT", "tests/engine/test_fleet.py"),
    Defect("a long request has no room beside parts of a longer one", "scheduling", _FLEET, "sum(not batch.part for batch in batches) < _MOST_LONG", "len(batches) < _MOST_LONG", "tests/engine/test_fleet.py"),
    Defect("the worker does not say that a long request has room", "scheduling", _WORKER, "room=room)", "room=min(room, 1))", "tests/test_worker_engines.py -k better_priority"),
    Defect("bites of a long request count as parts of a longer one", "scheduling", _SCHEDULER, "is_part and is_cut", "is_part", "tests/test_scheduler_packed.py -k bite_of_a_long"),
    Defect("a long request overtakes parts of one of its own priority", "scheduling", _SCHEDULER, "any(priority > job.priority", "any(priority >= job.priority", "tests/test_scheduler_packed.py -k unless_its_priority"),
    Defect("a long request gives way to others of its priority", "scheduling", _SCHEDULER, "any(priority < job.priority", "any(priority <= job.priority", "tests/test_scheduler_packed.py -k better_priority_come"),
    Defect("a part is sent for its priority alone", "scheduling", _SCHEDULER, "not is_cut and self._is_better(job)", "self._is_better(job)", "tests/test_scheduler_packed.py -k priority_alone"),
    Defect("three single passes are sent to four threads", "scheduling", _SCHEDULER, "2 if self.pace.parallel == 2 else 1", "self.pace.parallel", "tests/test_scheduler_packed.py -k every_thread_busy"),
    Defect("parts of a long request stay large while others come", "scheduling", _SCHEDULER, "_MIXED_SECONDS = 1.0", "_MIXED_SECONDS = 0.0", "tests/test_scheduler_packed.py -k better_priority_come"),
    Defect("the end of a long request is taken for another", "scheduling", _SCHEDULER, "not is_cut and job.dispatched_at is None", "not is_cut", "tests/test_scheduler_packed.py -k is_no_other"),
    Defect("pairs that are being scored already fill a batch", "scheduling", _SCHEDULER, "            count += pairs", "            count += size", "tests/test_scheduler_sharing.py -k thousands_of_copies"),
    Defect("of few long documents a batch takes as much as of a long request", "scheduling", _SCHEDULER, "else whole if is_long else short", "else whole", "tests/test_scheduler_packed.py -k few_long_documents"),
    Defect("a long request that was answered holds others back", "scheduling", _SCHEDULER, "        self._long_priorities.pop(batch.number, None)\n        finished", "        finished", "tests/test_scheduler_packed.py -k no_longer_in_flight"),
    Defect("the waiting time of a packing engine goes by rounds", "scheduling", _SCHEDULER, "job.missing if self.pace.packed else ", "", "tests/test_scheduler_packed.py -k until_there_is_room"),
    Defect("parts of a long request fill the engine", "scheduling", _SCHEDULER, "if is_long and room < (Room.LONG if overtakes else Room.PART):", "if False:", "tests/test_scheduler_packed.py"),
    Defect("a standstill counts as slowness", "scheduling", _PACE, "_MOST_TIMES = 8.0", "_MOST_TIMES = 8e9", "tests/test_scheduler.py"),
    Defect("batches that end at once count as speed", "scheduling", _PACE, "min(self._tokens / self._ms, _MOST_GROWTH * self.tokens_per_ms)", "self.tokens_per_ms + 0.3 * (min(tokens / max(elapsed, 0.01), 4 * self.tokens_per_ms) - self.tokens_per_ms)", "tests/test_scheduler.py"),
    Defect("pairs of any length meet", "scheduling", _SCHEDULER, "if -item[0] <= longest]", "if True]", "tests/test_scheduler_narrow.py"),
    Defect("copies in flight are never told", "scheduling", _SHARING, "            if waiters:\n", "            if False:\n", "chaos 12 1"),
    Defect("a copy is told the next pair's score", "scheduling", _SHARING, "waiters.append((job, index))", "waiters.append((job, max(0, index - 1)))", "chaos 40 1"),
    Defect("scores shift by one slice", "scheduling", _SCHEDULER, "            offset += size\n", "", "chaos 20 1"),
    Defect("deadlines come a second late", "scheduling", _SCHEDULER, "and deadline <= now:", "and deadline <= now - 1:", _transcript("10_")),
    Defect("bytes of done requests stay counted", "scheduling", _SCHEDULER, "        self.waiting_bytes -= job.num_bytes\n", "", "chaos 5 1"),
    # --- supervision
    Defect("one pair is not sent again after a crash", "supervision", _SCHEDULER, "item.job.take_back(range(item.start, item.stop))", "item.job.take_back(range(item.start + 1, item.stop))", _transcript("13_")),
    Defect("an innocent request is given up with the guilty one", "supervision", _SCHEDULER, "_MOST_CRASHES = 2", "_MOST_CRASHES = 1", _transcript("13_")),
    Defect("one death counts for each batch in flight", "supervision", _WORKER, "= self.scheduler.requeue(*event.batches)", "= [job for batch in event.batches for job in self.scheduler.requeue(batch)]", "chaos 150 1"),
    Defect("engines start when the front is whole", "supervision", _CLI, "        processes[0].start_early()", "        pass", f"{_START} -k before_the_rest"),
    Defect("an early start that failed counts as done", "supervision", _HANDLE, "            self._is_early = True", "            pass\n        self._is_early = True", f"{_START} -k early_is_started_later"),
    Defect("news of other batches hides one that hangs", "supervision", _FLEET, "if engine.makes_progress(frame):", "if True:", "tests/process/test_engine_faults.py -k thread_that_hangs"),
    Defect("a hung engine is left alone", "supervision", _FLEET, 'self._kill(engine, "it hung while scoring")', "pass", _transcript("13_")),
    Defect("a restart storm is not noticed", "supervision", _RESTARTS, "return len(self._deaths) >= len(DELAYS_SECONDS)", "return False", _transcript("14_")),
    Defect("a failed start does not say why", "supervision", _WORKER, "        self._desk.error(Refusal(None, Code.MODEL_LOAD_ERROR, event.error))\n", "", _transcript("20_")),
    # --- drain
    Defect("an incomplete drain exits with 0", "drain", _WORKER, "_DRAINED_INCOMPLETELY if self._left_something else _DRAINED", "_DRAINED", _transcript("16_")),
    Defect("a drain gives up at once", "drain", _WORKER, "if self._desk and now >= self._drain_until:", "if self._desk:", _transcript("15_")),
    Defect("shutdown is acknowledged and forgotten", "drain", _WORKER, '        if message.type == "shutdown":\n            self.drain(now)\n', "", _transcript("15_")),
    # --- scoring
    Defect("scores come in the order of the pass", "scoring", _SCORING, "for index, logit in zip(indices, logits, strict=True):", "for index, logit in zip(sorted(indices), logits, strict=True):", "tests/engine/test_scoring.py -k at_its_own_pair"),
    Defect("a score that is no number leaves", "scoring", _SCORING, "if math.isfinite(logit):", "if True:", _transcript("13_")),
    Defect("half of a pass is lost when memory runs out", "scoring", _SCORING, "        self._pass(tokens, indices[middle:], outcome)\n", "", _transcript("13_")),
    Defect("the sigmoid is upside down", "scoring", _SCORING, "return power / (1.0 + power)", "return 1.0 / (1.0 + power)", _transcript("01_")),
    Defect("what waits is scored in the order of its coming", "scoring", _CREW, "self._work.put((order, next", "self._work.put((0, next", "tests/engine/test_scoring.py"),
    Defect("a quick batch waits for the one before it", "scoring", _CHILD, "                    future.add_done_callback(partial(self._tell, started))", "                    started.unfinished -= 1\n                self._passed.put(started)", "tests/process/test_flow.py -k slower_one"),
    Defect("an error of the tokenizer leaves the engine deaf", "supervision", _CHILD, "            self._tell(error)", "            pass", "tests/process/test_engine_faults.py -k tokenizer"),
    Defect("an outlier coarsens the steps of all", "scoring", _CALIBRATION, "if _LEAST_REACH[encoder.activation] < reach < ranges[name].high / _LEAST_GAIN:", "if False:", f"{_PREWARM} -k far_beyond"),
    Defect("copies of an outlier all say the same", "scoring", _CALIBRATION, "layer.up.bias[channels] - lower]", "layer.up.bias[channels]]", f"{_PREWARM} -k far_beyond"),
    Defect("a batch that is answered stays in memory", "scoring", _SCORING, "        started.futures.clear()", "        pass", "tests/engine/test_scoring.py"),
    Defect("the threads do not end together", "scoring", _SCORING, "if soonest >= best:", "if True:", "tests/engine/test_scoring.py"),
    # --- answers
    Defect("a line has a length that hangs the known host", "answers", _ANSWERS, "if whole >= 1 and len(line) <= _STDIO_BUFFER_BYTES * whole:", "if False:", "tests/protocol/test_answers.py"),
    Defect("a partial answer hides what it lacks", "answers", _ANSWERS, "if score is None]", "if score is None and False]", _transcript("10_")),
    Defect("answers are not ASCII", "answers", _ANSWERS, "if text.isascii():", "if True:", _transcript("04_")),
    # --- backends
    Defect("padding is attended to", "backends", _PACKING, "MASKED = -30000.0", "MASKED = 0.0", _ONNX),
    Defect("positions go on from pair to pair", "backends", _PACKING, "np.concatenate((np.arange(total) - np.repeat(starts, lengths), extra))", "np.concatenate((np.arange(total), extra))", _ONNX),
    Defect("token types of an untyped model are used", "backends", _ENCODER, "(len(token_type) == 1 or not typed)", "len(token_type) == 1", "tests/backends/test_onnx.py -k untyped"),
    Defect("RoBERTa's positions begin at zero", "backends", _ENCODER, "    if names.first_position:", "    if False:", _ONNX),
    Defect("the last layer's residual is another token", "backends", _GRAPH, "return self._feed_forward(name, layer, context, first)", 'return self._feed_forward(name, layer, context, self._node("Gather", [state, "gather"]))', _ONNX),
    Defect("the last layer's value loses its bias", "backends", _GRAPH, 'self._constant(name + ".value.bias", layer.value.bias)', 'self._constant(name + ".value.bias", layer.value.bias * np.float32(0.0))', _ONNX),
    Defect("the last layer looks at empty places", "backends", _GRAPH, 'self._node("Add", [scores, self._node("Squeeze", ["mask", "axis_1"])])', "scores", _ONNX),
    Defect("int8 sums overflow on older CPUs", "backends", _GRAPH, "_greatest_pair(weight) / np", "np.abs(weight).max(axis=0) / np", "tests/prewarm -k int8"),
    Defect("a leftover tensor is overlooked", "backends", _ENCODER, "    reader.refuse_leftovers()\n", "", "tests/backends/test_onnx.py -k something_else"),
    Defect("int8 without a check of its ranking", "backends", _CHOOSING, 'if dtype == "int8":', "if False:", "tests/backends/test_onnx.py -k precision"),
    Defect("auto never looks for an accelerator", "backends", _CHOOSING, '(config.device == "auto" and may_have_accelerator())', "False", "tests/backends/test_choosing.py"),
    Defect("bfloat16 is read as whole numbers", "backends", "reranker_worker/models/safetensors.py", 'if tensor.dtype == "BF16":', "if False:", _ONNX),
    # --- prewarming
    Defect("a stale artefact is used", "prewarming", _ARTEFACTS, "            return True\n    return False", "            pass\n    return False", _PREWARM),
    Defect("a damaged artefact is not noticed", "prewarming", _MAKING, "    verify_manifest(target, progress)\n", "", _PREWARM),
    Defect("an artefact is put in its place before it is compared", "prewarming", _MAKING, "    if problem is not None:\n", "    if False:\n", _PREWARM),
    Defect("two runs at once do not wait for each other", "prewarming", _MAKING, "            fcntl.flock(file, fcntl.LOCK_EX)\n", "", _PREWARM),
    Defect("an artefact of another precision is used", "prewarming", _ARTEFACTS, 'and config.dtype in ("auto", artefact.dtype)', "", _PREWARM),
    Defect("a foreign directory is replaced", "prewarming", _MAKING, "if output and target.exists() and not is_artefact(target)", "if False and not is_artefact(target)", _PREWARM),
]
