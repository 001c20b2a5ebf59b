"""bench/trace_gaps.py on a trace made by hand: what it calls idle, waiting, an allocation, and whose kernel is whose."""

import gzip
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "bench" / "trace_gaps.py"
spec = importlib.util.spec_from_file_location("trace_gaps", SCRIPT)
trace_gaps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trace_gaps)

FORWARD = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
BACKWARD = "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_2_kernel0_0"
OURS = "void uly::kernels::(anonymous namespace)::rms_norm_kernel<__nv_bfloat16, 8>(uly::kernels::RmsNormArgs)"
COMPUTE, COPIES, LAUNCHER, OTHER = 7, 13, 100, 101


def event(cat, name, ts, dur, tid, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0 if cat.startswith(("kernel", "gpu")) else 1, "tid": tid, "args": args}


def kernel(name, ts, dur, stream=COMPUTE):
    return event("kernel", name, ts, dur, stream, stream=stream)


def make_trace():
    """Step 2 lasts from 1000 to 2000 us; step 1 before it and one kernel after it do not count."""
    launches = [event("cuda_runtime", "cudaLaunchKernelExC_v11060", t, 2, LAUNCHER) for t in range(1000, 1100, 10)]
    return [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "x"}},
        event("user_annotation", "step 1", 0, 1000, LAUNCHER),
        event("user_annotation", "step 2", 1000, 1000, LAUNCHER),
        kernel("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 500, 400),
        kernel(OURS, 990, 110),                                           # 100 of it in the window
        kernel("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 1100, 200),
        kernel(FORWARD, 1302, 198),                                       # after 2 us: no gap worth a line
        event("gpu_memset", "Memset (Device)", 1500, 20, COMPUTE, stream=COMPUTE),
        kernel(BACKWARD, 1600, 300),                                      # after 80 us
        kernel("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)", 1700, 20),  # runs beside it
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1510, 60, COPIES, stream=COPIES),
        kernel("nvjet_late", 2000, 50),
        *launches,
        event("cuda_runtime", "cudaMemcpyAsync", 1110, 3, LAUNCHER),
        event("cuda_runtime", "cudaStreamSynchronize", 1200, 700, LAUNCHER),
        event("cuda_driver", "cuMemcpyDtoH_v2", 1950, 10, LAUNCHER),
        event("cuda_runtime", "cudaStreamWaitEvent", 1960, 5, LAUNCHER),   # the stream waits, the thread does not
        event("cuda_runtime", "cudaEventSynchronize", 1300, 400, OTHER),   # another thread
        event("cuda_runtime", "cudaDeviceSynchronize", 10, 900, LAUNCHER),  # another step
        event("cuda_runtime", "cudaMalloc", 1150, 30, LAUNCHER),
        event("cuda_driver", "cuMemFree_v2", 1400, 8, OTHER),
        event("cuda_runtime", "cudaHostAlloc", 200, 30, LAUNCHER),
    ]


def test_one_step_is_read_as_it_ran():
    report = trace_gaps.read({"traceEvents": make_trace()})
    assert report["window"] == "step 2" and report["window_ms"] == 1.0
    assert report["compute_stream"] == COMPUTE and report["launching_thread"] == LAUNCHER
    # Busy: 1000-1300, 1302-1520, 1600-1900.
    assert report["idle_share"] == pytest.approx(0.182)
    assert report["idle_share_of_all_streams"] == pytest.approx(0.132)
    assert report["gaps"]["count"] == 2 and report["gaps"]["ms"] == pytest.approx(0.18)
    assert report["gaps"]["longest"][0] == {"us": 100.0, "at_ms": 0.9, "after": trace_gaps.kernel_name(BACKWARD)}
    assert report["waits"] == {"calls": 2, "ms": 0.71, "by_name": {"cudaStreamSynchronize": 1, "cuMemcpyDtoH": 1}}
    assert report["memcpy_async"] == {"calls": 1, "ms": 0.003, "by_name": {"cudaMemcpyAsync": 1}}
    assert report["allocations"] == {"calls": 2, "ms": 0.038, "by_name": {"cudaMalloc": 1, "cuMemFree": 1}}
    assert {k: v["ms"] for k, v in report["families"].items()} == {"attention_backward": 0.3, "gemm": 0.2, "attention_forward": 0.198, "ours": 0.1, "other": 0.02}
    assert report["ours"] == {"rms_norm_kernel": {"calls": 1, "ms": 0.1, "share": 0.1}}


def test_a_step_can_be_chosen_and_the_gpus_own_annotation_counts():
    events = make_trace() + [event("gpu_user_annotation", "step 1", 500, 400, COMPUTE)]
    report = trace_gaps.read({"traceEvents": events}, step=1)
    assert report["window"] == "step 1" and report["window_ms"] == 0.4 and report["idle_share"] == 0
    assert report["launching_thread"] is None and report["waits"]["calls"] == 0 and report["allocations"]["by_name"] == {"cudaHostAlloc": 1}
    with pytest.raises(SystemExit, match="step 9"):
        trace_gaps.read({"traceEvents": events}, step=9)


def test_without_annotations_the_window_is_that_of_the_kernels(tmp_path):
    events = [e for e in make_trace() if e.get("cat") != "user_annotation"]
    for path, opener in ((tmp_path / "trace.json", open), (tmp_path / "trace.json.gz", gzip.open)):
        with opener(path, "wt") as file:
            json.dump({"traceEvents": events}, file)
        report = json.loads(subprocess.run([sys.executable, SCRIPT, path], check=True, capture_output=True, text=True).stdout)
        assert report["window"] == "first to last kernel" and report["window_ms"] == pytest.approx(1.55) and report["kernels"] == 7


@pytest.mark.parametrize("name, expected", [
    (FORWARD, "attention_forward"), (BACKWARD, "attention_backward"), (OURS, "ours"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<x>(y)", "attention_backward"), ("void pytorch_flash::flash_fwd_kernel<x>(y)", "attention_forward"),
    ("fmha_cutlassB_f32_aligned_64x64_k64_sm80(PyTorchMemEffAttention)", "attention_backward"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"), ("void cutlass::Kernel2<cutlass_80_tensorop>(x)", "gemm"), ("nvjet_hsh_64x8", "gemm"),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "exchange"), ("void at::native::reduce_kernel<512>(x)", "other"),
])
def test_kernels_are_told_apart_by_their_names(name, expected):
    assert trace_gaps.family(name) == expected
