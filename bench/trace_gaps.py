#!/usr/bin/env python3
"""What a trace of one step says about waiting: idle time of the GPU, API calls that wait, allocations, time by kernel.

Reads a Chrome trace as Kineto writes it (`ulysses-engine --profile`, torch.profiler), plain or .gz. The window is the last
user annotation "step N" (--step chooses; of the GPU's own copy of it, where there is one, for what runs there), else from
the first kernel to the end of the last. The compute stream is the one with most kernel time in the window; it is idle
where none of its kernels, copies and fills run. The launching thread is the one that launches most kernels. Prints JSON.

usage: bench/trace_gaps.py TRACE.json[.gz] [--step N] [--gap 5]     # --gap: microseconds from which a gap is listed
"""

import argparse
import collections
import gzip
import json
import re
import sys

WAITS = re.compile(r"(cuda|cu)(Stream|Device|Event|Ctx|Thread)Synchronize|cudaMemcpy(2D|3D|ToSymbol|FromSymbol|Peer)?|cuMemcpy(HtoD|DtoH|DtoD|2D|3D|Peer)?")
ALLOCATIONS = re.compile(r"cuda(Malloc|Free)\w*|cudaHost(Alloc|Register|Unregister)|cuMem(Alloc|Free|HostAlloc|HostRegister|HostUnregister|Create|Release|Map|Unmap|AddressReserve|AddressFree)\w*")
LAUNCHES = re.compile(r"(cuda|cu)(Launch\w*Kernel\w*|GraphLaunch)")
VERSION = re.compile(r"_(v\d+|ptsz|ptds)")


def api_name(name):
    """cuMemAlloc_v2 and cudaMemcpy_ptsz are what they are without the ending."""
    return VERSION.sub("", name)


def kernel_name(name):
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    text = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", text, maxsplit=1)[0].rsplit("::", 1)[-1] or name


def family(name):
    low = name.lower()
    attention = ("cudnn" in low and ("sdpa" in low or "flash" in low or "fmha" in low)) or re.search(r"flash_(fwd|bwd)|fmha_cutlass|flash::", low)
    if attention:
        return "attention_backward" if re.search(r"bprop|bwd|backward|fmha_cutlassb", low) else "attention_forward"
    if "nccl" in low:
        return "exchange"
    if "uly::" in low:
        return "ours"
    if re.search(r"nvjet|cutlass|xmma|gemm|gemv|cublas|splitk", low):
        return "gemm"
    return "other"


def union(spans):
    """Sorted spans that do not overlap."""
    merged = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def clipped(event, window):
    return max(event["ts"], window[0]), min(event["ts"] + event["dur"], window[1])


def most(pairs):
    """The key with the largest sum."""
    sums = collections.Counter()
    for key, value in pairs:
        sums[key] += value
    return sums.most_common(1)[0][0] if sums else None


def find_window(events, step):
    """((begin, end) on the host, the same on the GPU, name), in microseconds."""
    def named(category):
        found = {}
        for e in events:
            match = re.fullmatch(r"step (\d+)", e["name"]) if e.get("cat") == category else None
            if match and step in (None, int(match[1])):
                begin, end = found.get(int(match[1]), (e["ts"], e["ts"] + e["dur"]))  # the GPU's has one for each stream
                found[int(match[1])] = (min(begin, e["ts"]), max(end, e["ts"] + e["dur"]))
        return found

    host, device = named("user_annotation"), named("gpu_user_annotation")
    if host:
        n = max(host)
        return host[n], device.get(n, host[n]), f"step {n}"
    if step is not None:
        sys.exit(f"trace_gaps: no annotation 'step {step}'")
    kernels = [e for e in events if e.get("cat") == "kernel"]
    if not kernels:
        sys.exit("trace_gaps: no kernels in this trace")
    window = (min(e["ts"] for e in kernels), max(e["ts"] + e["dur"] for e in kernels))
    return window, window, "first to last kernel"


def count(events, window):
    """Calls, time and calls by name of API events that begin in the window."""
    chosen = [e for e in events if window[0] <= e["ts"] < window[1]]
    return {"calls": len(chosen), "ms": round(sum(e["dur"] for e in chosen) / 1e3, 3), "by_name": dict(collections.Counter(api_name(e["name"]) for e in chosen))}


def read(trace, step=None, gap_us=5.0):
    """The report of a trace's events: a dict."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    host, device, name = find_window(events, step)
    length = device[1] - device[0]

    def stream(e):
        return (e.get("pid"), e.get("args", {}).get("stream", e.get("tid")))

    def within(e):
        begin, end = clipped(e, device)
        return end > begin

    kernels = [e for e in events if e.get("cat") == "kernel" and within(e)]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and within(e)]
    compute = most((stream(e), clipped(e, device)[1] - clipped(e, device)[0]) for e in kernels)
    busy = union(clipped(e, device) for e in work if stream(e) == compute)
    any_busy = union(clipped(e, device) for e in work)
    edges = [device[0], *(t for span in busy for t in span), device[1]]
    ends = {}  # what ran last before each gap
    for e in work:
        if stream(e) == compute:
            ends[clipped(e, device)[1]] = kernel_name(e["name"])
    gaps = sorted(((edges[i + 1] - edges[i], edges[i]) for i in range(0, len(edges), 2) if edges[i + 1] - edges[i] >= gap_us), reverse=True)

    families, ours = {}, {}
    for e in kernels:
        time = clipped(e, device)[1] - clipped(e, device)[0]
        places = [families.setdefault(family(e["name"]), [0, 0.0])]
        if family(e["name"]) == "ours":
            places.append(ours.setdefault(kernel_name(e["name"]), [0, 0.0]))
        for place in places:
            place[0] += 1
            place[1] += time

    def shares(found):
        return {k: {"calls": n, "ms": round(t / 1e3, 3), "share": round(t / length, 4)} for k, (n, t) in sorted(found.items(), key=lambda item: -item[1][1])}

    api = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launcher = most(((e.get("pid"), e.get("tid")), 1) for e in api if LAUNCHES.fullmatch(api_name(e["name"])) and host[0] <= e["ts"] < host[1])
    mine = [e for e in api if (e.get("pid"), e.get("tid")) == launcher]
    return {
        "window": name,
        "window_ms": round(length / 1e3, 3),
        "compute_stream": compute and compute[1],
        "idle_share": round(1 - sum(e - b for b, e in busy) / length, 5),
        "idle_share_of_all_streams": round(1 - sum(e - b for b, e in any_busy) / length, 5),
        "gaps": {"at_least_us": gap_us, "count": len(gaps), "ms": round(sum(g for g, _ in gaps) / 1e3, 3),
                 "longest": [{"us": round(g, 1), "at_ms": round((at - device[0]) / 1e3, 3), "after": ends.get(at, "begin of the window")} for g, at in gaps[:5]]},
        "launching_thread": launcher and launcher[1],
        "waits": count([e for e in mine if WAITS.fullmatch(api_name(e["name"]))], host),
        "memcpy_async": count([e for e in mine if re.match(r"(cuda|cu)(Memcpy|Memset)\w*Async", e["name"])], host),  # long ones wait too: memory that is not pinned
        "allocations": count([e for e in api if ALLOCATIONS.fullmatch(api_name(e["name"]))], host),
        "kernels": len(kernels),
        "families": shares(families),
        "ours": shares(ours),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--step", type=int)
    parser.add_argument("--gap", type=float, default=5.0)
    args = parser.parse_args()
    opener = gzip.open if args.trace.endswith(".gz") else open
    with opener(args.trace, "rt", errors="replace") as file:
        trace = json.load(file)
    print(json.dumps(read(trace if isinstance(trace, dict) else {"traceEvents": trace}, args.step, args.gap), indent=1))


if __name__ == "__main__":
    main()
