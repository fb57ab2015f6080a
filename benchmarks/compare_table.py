"""The table of ratios, from the results of compare.py."""

from statistics import median

PEERS = ("TRL", "LLaMA-Factory")
OURS = "LLM-Dojo"
# what → (case, figure, turn, {peer: goal}); "more" where a larger ratio is better
ROWS = [
    ("training throughput, each with its defaults", "default", "throughput", {"TRL": 2.2, "LLaMA-Factory": 2.2}),
    ("training throughput, each at its best (packed)", "best", "throughput", {"TRL": 1.1, "LLaMA-Factory": 1.1}),
    ("peak memory, each with its defaults", "default", "peak", {"TRL": 0.5}),
    ("vocabulary of 151,936: training throughput", "vocabulary", "throughput", {"TRL": 3.0}),
    ("vocabulary of 151,936: peak memory", "vocabulary", "peak", {"TRL": 0.4}),
    ("preparing all rows, first time", "preparing", "preparing", {"TRL": 3.0, "LLaMA-Factory": 3.0}),
    ("starting again on prepared rows, to the first step", "preparing", "again", {"TRL": 3.0, "LLaMA-Factory": 3.0}),
    ("from command to first step, 1,000 rows", "first step", "first_step", {"TRL": 0.6}),
]
LESS_IS_BETTER = ("peak", "first_step")
MANY_ROWS = "peak memory with 1,000,000 rows, by that with 100,000"
# the words of the table, for README_zh.md
CHINESE = {
    "ratio, this project : peer": "比值（本项目 : 对方）",
    "goal": "目标",
    "training throughput, each with its defaults": "训练吞吐量，各用默认设置",
    "training throughput, each at its best (packed)": "训练吞吐量，各用最佳设置（打包）",
    "peak memory, each with its defaults": "峰值内存，各用默认设置",
    "vocabulary of 151,936: training throughput": "词表 151,936：训练吞吐量",
    "vocabulary of 151,936: peak memory": "词表 151,936：峰值内存",
    "preparing all rows, first time": "首次处理全部数据的速度",
    "starting again on prepared rows, to the first step": "用处理好的数据再次启动，到第一步的速度",
    "from command to first step, 1,000 rows": "从运行命令到第一步的时间，1,000 条样本",
    MANY_ROWS: "1,000,000 条样本的峰值内存，与 100,000 条之比",
    "at least": "至少",
    "at most": "至多",
    ", goal missed": "，未达到目标",
    "not measured": "未测量",
    " (itself)": "（与自身比）",
    " threads; ": " 线程；",
    ". Median of the repeats (": "。括号外为多次重复的中位数（重复次数：",
    "), and their range.": "），括号内为范围。",
    "default ": "默认设置 ",
    "best ": "最佳设置 ",
    "vocabulary ": "大词表 ",
    "preparing ": "处理数据 ",
    "first step ": "第一步 ",
    "many rows ": "大量样本 ",
    "Not measured yet.": "尚未测量。",
    " to ": " 至 ",  # of a range; the shortest comes last
}
MANY_GOAL = 1.1


def figure(results: dict, case: str, name: str, program: str, repeat: int) -> float | None:
    """One figure of one run; a throughput in rows' trained tokens per second, times in seconds, memory in bytes."""
    runs = {
        run["turn"]: run
        for run in results["runs"]
        if (run["case"], run["program"], run["repeat"]) == (case, program, repeat) and "error" not in run
    }
    if name == "throughput":
        run = runs.get("first")
        # the first step's end starts the clock, so that its rows do not count
        share = run and (run["steps"] - 1) / run["steps"]
        return share * results["trained_tokens"][case] / run["training"] if run and run["training"] else None
    if name == "again":
        return 1 / runs["again"]["first_step"] if "again" in runs else None
    if name == "preparing":
        # what it takes beyond a start on few rows
        few = figure(results, "first step", "first_step", program, repeat)
        return 1 / (runs["first"]["first_step"] - few) if few and "first" in runs else None
    return runs["first"][name] if "first" in runs else None


def ratios(results: dict, case: str, name: str, peer: str) -> list[float]:
    """This project's figure by the peer's, for each repeat."""
    repeats = sorted({run["repeat"] for run in results["runs"] if run["case"] == case})
    found = []
    for repeat in repeats:
        ours, theirs = (figure(results, case, name, program, repeat) for program in (OURS, peer))
        if ours and theirs:
            found.append(ours / theirs)
    return found


def in_chinese(text: str) -> str:
    """The table with the words of `CHINESE`, the longest first."""
    for words in sorted(CHINESE, key=len, reverse=True):
        text = text.replace(words, CHINESE[words])
    return text


def table(results: dict) -> str:
    """The goals and what was measured: median of the ratios, lowest and highest."""
    lines = ["| ratio, this project : peer | goal | TRL | LLaMA-Factory |", "|---|---|---|---|"]
    for what, case, name, goals in ROWS:
        less = name in LESS_IS_BETTER
        goal = next(iter(goals.values()))
        cells = []
        for peer in PEERS:
            found = ratios(results, case, name, peer)
            cells.append(_said(found, goals.get(peer), less) if found else "not measured")
        lines.append(f"| {what} | {'at most' if less else 'at least'} {goal:g} | {' | '.join(cells)} |")
    lines.append(
        f"| peak memory with 1,000,000 rows, by that with 100,000 | at most {MANY_GOAL} | {_many(results)} | |"
    )
    return "\n".join([*lines, "", _conditions(results)])


def _many(results: dict) -> str:
    """The peer of many rows is this project itself on fewer."""
    peaks: dict[int, dict[int, int]] = {}
    for run in results["runs"]:
        if run["case"] == "many rows" and "error" not in run:
            peaks.setdefault(run["repeat"], {})[int(run["turn"])] = run["peak"]
    found = [peak[max(peak)] / peak[min(peak)] for peak in peaks.values() if len(peak) == 2]
    return f"{_said(found, MANY_GOAL, less=True)} (itself)" if found else "not measured"


def _said(found: list[float], goal: float | None, less: bool) -> str:
    """The median, the range where there is one, and whether it misses the goal."""
    middle = median(found)
    missed = goal is not None and (middle > goal if less else middle < goal)
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{middle:.2f}{spread}{', goal missed' if missed else ''}"


def _conditions(results: dict) -> str:
    if "hardware" not in results:
        return "Not measured yet."
    machine = results["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    counts = {run["case"]: run["repeat"] + 1 for run in results["runs"] if "error" not in run}
    repeats = ", ".join(f"{case} {count}" for case, count in counts.items())
    where = f"{machine['cpu']}, {results['threads']} threads; {versions}."
    return f"{where} Median of the repeats ({repeats}), and their range."
