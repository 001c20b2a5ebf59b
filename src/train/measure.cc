#include "train/measure.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "base/shapes.h"
#include "comm/world.h"
#include "engine/make.h"
#include "kernels/bf16.h"
#include "launch/environment.h"
#include "memory/disk.h"
#include "memory/host_arena.h"
#include "models/spec.h"
#include "ops/places.h"
#include "plan/measured.h"
#include "plan/price.h"

namespace uly::train {
namespace {

using Clock = std::chrono::steady_clock;
using ops::Buffer;
using ops::Kind;
using ops::Tier;
using plan::Rates;

// A kind is repeated until it takes so long: a GPU has come to its power limit, a CPU's clock has settled.
constexpr double kLongEnough = 1.0;
constexpr int64_t kMostRounds = int64_t{1} << 14;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// Sizes that are large for the device.
struct Sizes {
  int64_t tokens, columns, wide;          // of products
  int64_t attention_tokens, heads, kv_heads, head;
  double attention_half_tokens;           // see plan::Rates
  int64_t elements;                       // of an update, or a copy
};
constexpr Sizes kCpu = {.tokens = 2048, .columns = 1024, .wide = 2048, .attention_tokens = 2048, .heads = 8, .kv_heads = 4, .head = 64, .attention_half_tokens = 0, .elements = int64_t{1} << 26};
constexpr Sizes kGpu = {.tokens = 16384, .columns = 4096, .wide = 14336, .attention_tokens = 32768, .heads = 32, .kv_heads = 8, .head = 128, .attention_half_tokens = plan::kGpuAttentionHalfTokens, .elements = int64_t{1} << 28};

// A program that prepares its buffers, then calls `begun`, then does the same `rounds` times.
using Begun = std::function<void()>;
using Program = std::function<void(ops::Ops&, const Begun&, int64_t rounds)>;

class Meter {
 public:
  Meter(engine::Engine& engine, comm::World& world, const Sizes& sizes, const ops::AttentionSchedule& schedule) : engine_(engine), groups_{world.size(), world.size()}, sizes_(sizes), schedule_(schedule) {}

  // What `program` does a second, counted as the plan counts it where this rate alone takes time.
  double rate(double Rates::*which, int64_t tokens, const Program& program) {
    Rates unit;
    unit.*which = 1;
    unit.attention_half_tokens = sizes_.attention_half_tokens;
    const auto amount = [&](int64_t rounds) {
      plan::Priced priced(groups_, tokens, ops::document_table_bytes(schedule_, tokens), unit);
      program(priced, [] {}, rounds);
      double most = 0;
      for (const double busy : priced.so_far().busy) most = std::max(most, busy);
      return most;
    };
    run(tokens, program, 1);  // plans are built, memory is touched
    for (int64_t rounds = 1;;) {
      const double seconds = run(tokens, program, rounds);
      if (seconds >= kLongEnough || rounds >= kMostRounds) return (amount(rounds) - amount(0)) / seconds;
      const double enough = 1.2 * kLongEnough / std::max(seconds, 1e-6) * static_cast<double>(rounds);
      rounds = std::min({kMostRounds, 64 * rounds, std::max<int64_t>(rounds + 1, static_cast<int64_t>(enough))});
    }
  }

  // Seconds of the rounds.
  double run(int64_t tokens, const Program& program, int64_t rounds) {
    const int64_t table = ops::document_table_bytes(schedule_, tokens);
    plan::Priced priced(groups_, tokens, table);
    program(priced, [] {}, rounds);
    places_.push_back(std::make_unique<ops::Places>(priced.price().step_places));
    engine::BatchData batch{.document_starts = {0, tokens}, .inverse_frequencies = std::vector<float>(static_cast<size_t>(sizes_.head / 2), 0.5f)};
    for (int64_t i = 0; i < tokens; ++i) batch.ids.push_back(0), batch.labels.push_back(i % sizes_.wide), batch.positions.push_back(i);
    engine_.begin_step(*places_.back(), std::move(batch), table);
    Clock::time_point begin;
    program(engine_, [&] { engine_.finish(), begin = Clock::now(); }, rounds);
    engine_.finish();
    return seconds_since(begin);
  }

 private:
  engine::Engine& engine_;
  std::array<int64_t, 2> groups_;
  Sizes sizes_;
  ops::AttentionSchedule schedule_;
  std::vector<std::unique_ptr<ops::Places>> places_;  // the engine refers to them
};

// Numbers as they occur: zeros take less power than others.
void fill(ops::Ops& ops, const Buffer& b) {
  auto* engine = dynamic_cast<engine::Engine*>(&ops);
  if (engine == nullptr) return;
  constexpr int64_t kAtOnce = int64_t{1} << 20;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.5f);
  std::vector<float> values(static_cast<size_t>(std::min(kAtOnce, b.elements())));
  for (float& x : values) x = normal(random);
  std::vector<kernels::Bf16> rounded;
  for (const float x : values) rounded.push_back(kernels::to_bf16(x));
  const Buffer flat = b.view(0, 1, b.elements());
  for (int64_t at = 0; at < b.elements(); at += kAtOnce) {
    const Buffer part = flat.column_range(at, std::min(kAtOnce, b.elements() - at));
    if (b.dtype == Dtype::kBf16) engine->write(part, rounded.data());
    else engine->write(part, values.data());
  }
}

ops::Held make(ops::Ops& ops, int64_t rows, int64_t columns, Dtype dtype, Tier tier = Tier::kDevice) { return {ops, rows, columns, dtype, Kind::kActivations, "measured", tier}; }
ops::Held filled(ops::Ops& ops, int64_t rows, int64_t columns, Dtype dtype) {
  ops::Held b = make(ops, rows, columns, dtype);
  fill(ops, b);
  return b;
}

// --- programs

// A product and its two gradients.
Program products(const Sizes& z, Dtype dtype) {
  return [=](ops::Ops& ops, const Begun& begun, int64_t rounds) {
    const ops::Held x = filled(ops, z.tokens, z.columns, dtype), w = filled(ops, z.wide, z.columns, dtype), dy = filled(ops, z.tokens, z.wide, dtype);
    const ops::Held y = make(ops, z.tokens, z.wide, dtype), dx = make(ops, z.tokens, z.columns, dtype), dw = make(ops, z.wide, z.columns, Dtype::kF32);
    begun();
    for (int64_t i = 0; i < rounds; ++i) ops.linear(y, x, w), ops.linear_dx(dx, dy, w), ops.linear_dw(dw, dy, x, false);
  };
}

Program attention(const Sizes& z, const ops::AttentionSchedule& schedule, Dtype dtype, bool backward) {
  return [=](ops::Ops& ops, const Begun& begun, int64_t rounds) {
    const ops::Heads heads{.n = z.heads, .k = z.kv_heads, .H = z.head, .G = z.heads / z.kv_heads};
    const int64_t S = z.attention_tokens, query = z.heads * z.head, all = query + 2 * z.kv_heads * z.head;
    const ops::Held qkv = filled(ops, S, all, dtype), o = make(ops, S, query, dtype), lse = make(ops, S, z.heads, Dtype::kF32);
    const auto workspace = [&](int64_t bytes) { return bytes > 0 ? make(ops, 1, bytes, Dtype::kU8) : ops::Held(); };
    const ops::Held forward_space = workspace(ops::attention_workspace_bytes(schedule, heads, S));
    if (!backward) {
      begun();
      for (int64_t i = 0; i < rounds; ++i) ops.attention(o, lse, qkv, forward_space, heads, schedule);
      return;
    }
    const ops::Held d_o = filled(ops, S, query, dtype), dqkv = make(ops, S, all, dtype), space = workspace(ops::attention_grad_workspace_bytes(schedule, heads, S));
    ops.attention(o, lse, qkv, forward_space, heads, schedule);
    begun();
    for (int64_t i = 0; i < rounds; ++i) ops.attention_grad(dqkv, d_o, qkv, o, lse, space, heads, schedule);
  };
}

// Norm, activation and loss, forward and back; what they overwrite is copied first.
Program elementwise(const Sizes& z, Dtype dtype) {
  return [=](ops::Ops& ops, const Begun& begun, int64_t rounds) {
    const ops::Held x = filled(ops, z.tokens, z.wide, dtype), w = filled(ops, 1, z.wide, dtype), gate_up = filled(ops, z.tokens, 2 * z.wide, dtype);
    const ops::Held y = make(ops, z.tokens, z.wide, dtype), rstd = make(ops, z.tokens, 1, Dtype::kF32), both = make(ops, z.tokens, 2 * z.wide, dtype), loss = make(ops, z.tokens, 1, Dtype::kF32);
    begun();
    for (int64_t i = 0; i < rounds; ++i) {
      ops.rms_norm(y, rstd, x, w, 1e-5);
      ops.swiglu(y, gate_up);
      ops.copy(both, gate_up);
      ops.swiglu_grad(both, Buffer{}, y);
      ops.copy(y, x);
      ops.cross_entropy(y, loss, ops.input(ops::Input::kLabels_s));
    }
  };
}

Program updates(const Sizes& z) {
  return [=](ops::Ops& ops, const Begun& begun, int64_t rounds) {
    const auto on_host = [&](int64_t columns, Dtype dtype) {
      const ops::Held zero = make(ops, 1, columns, dtype);
      ops.zero(zero);
      ops::Held b = make(ops, 1, columns, dtype, Tier::kHost);
      ops.wait(ops.move(b, zero));
      return b;
    };
    const ops::Held master = on_host(z.elements, Dtype::kF32), m = on_host(z.elements, Dtype::kF32), v = on_host(z.elements, Dtype::kF32), gradient = on_host(z.elements, Dtype::kF32);
    const ops::Held norm = on_host(1, Dtype::kF64), loss = on_host(1, Dtype::kF64);
    begun();
    for (int64_t i = 0; i < rounds; ++i) ops.wait(ops.adamw(master, master, m, v, gradient, norm, loss, {.first = 0, .count = z.elements}));
  };
}

// Both ways at once.
Program copies(const Sizes& z) {
  return [=](ops::Ops& ops, const Begun& begun, int64_t rounds) {
    const ops::Held out = make(ops, 1, z.elements, Dtype::kF32), in = make(ops, 1, z.elements, Dtype::kF32), to = make(ops, 1, z.elements, Dtype::kF32, Tier::kHost), from = make(ops, 1, z.elements, Dtype::kF32, Tier::kHost);
    ops.zero(out), ops.zero(in);
    ops.wait(ops.move(from, in)), ops.wait(ops.move(to, out));
    begun();
    for (int64_t i = 0; i < rounds; ++i) {
      const ops::Event leaving = ops.move(to, out), coming = ops.move(in, from);
      ops.wait(leaving), ops.wait(coming);
    }
  };
}

// --- what is no program of one rank

// Sent by each of two ranks of this machine, between two threads of this process.
double exchanged_bytes_a_second() {
  constexpr int64_t kBytes = int64_t{64} << 20, kTimes = 8;
  std::vector<comm::World> worlds = comm::World::threads(2);
  std::array<std::exception_ptr, 2> failures;
  std::array<double, 2> seconds{};
  {
    std::vector<std::jthread> ranks;
    for (size_t r = 0; r < worlds.size(); ++r)
      ranks.emplace_back([&, r] {
        try {
          std::vector<std::byte> send(2 * kBytes), receive(2 * kBytes);
          const std::vector<int64_t> halves{kBytes, kBytes};
          worlds[r].all().all_to_all(receive.data(), send.data(), halves, halves).wait();
          worlds[r].all().barrier();
          const Clock::time_point begin = Clock::now();
          for (int64_t i = 0; i < kTimes; ++i) worlds[r].all().all_to_all(receive.data(), send.data(), halves, halves).wait();
          seconds[r] = seconds_since(begin);
        } catch (...) {
          failures[r] = std::current_exception();
        }
      });
  }
  for (const std::exception_ptr& f : failures)
    if (f) std::rethrow_exception(f);
  return static_cast<double>(2 * kBytes * kTimes) / std::max(seconds[0], seconds[1]);  // as the plan counts them, with what stays
}

// The lower of writing and reading, as both are under way in turn.
double disk_bytes_a_second(const std::string& folder) {
  constexpr int64_t kPiece = int64_t{8} << 20, kPieces = 8, kBytes = int64_t{512} << 20;
  memory::Disk disk({folder}, kBytes, static_cast<int>(kPieces));
  const memory::HostArena ring(kPiece * kPieces, 1);
  std::fill_n(ring.base(), ring.bytes(), std::byte{1});
  double slowest = 0;
  int64_t bytes = kBytes;  // a slow disk gets less, and only what was written is read
  for (const bool write : {true, false}) {
    int64_t moved = 0;
    const Clock::time_point begin = Clock::now();
    for (int64_t at = 0, started = 0; at < bytes || disk.busy();) {
      if (at < bytes && started < kPieces) {
        std::byte* const piece = ring.base() + at / kPiece % kPieces * kPiece;
        if (write) disk.start_write(at, piece, kPiece, 0);
        else disk.start_read(at, piece, kPiece, 0);
        at += kPiece, ++started;
        continue;
      }
      disk.complete();
      --started, moved += kPiece;
      if (seconds_since(begin) > 3 * kLongEnough) bytes = std::min(bytes, at);
    }
    const double rate = static_cast<double>(moved) / seconds_since(begin);
    slowest = slowest > 0 ? std::min(slowest, rate) : rate;
  }
  return slowest;
}

}  // namespace

Json measure(const Measure& what) {
  const c10::InferenceMode no_autograd;
  std::vector<comm::World> alone = comm::World::threads(1);
  comm::World& world = alone[0];
  const std::unique_ptr<comm::Group> sequence = world.subgroup({0}, "sequence");
  const Sizes& z = what.cuda ? kGpu : kCpu;
  ops::AttentionSchedule schedule;
  if (what.cuda) {
    schedule.backend = what.attention == "flash" ? ops::AttentionBackend::kFlash : ops::AttentionBackend::kCudnn;
    schedule.forward_block = z.attention_tokens, schedule.kv_heads_at_once = 1;
  }
  const std::unique_ptr<engine::Engine> engine =
      what.cuda ? engine::make_cuda_engine(launch::program_folder(), world.all(), *sequence, {.scratch_bytes = ops::kernel_scratch_bytes(2 * z.wide), .advice = [](int64_t) { return std::string(); }}) : engine::make_cpu_engine(world.all(), *sequence, {});
  engine->set_update({.learning_rate = 1e-4});
  Meter meter(*engine, world, z, schedule);

  const auto told = [](double rate, std::string_view name, double unit, const char* of) {
    say("measured   {:<34} {:>9.1f} {}", name, rate / unit, of);
    return rate;
  };
  constexpr double kGiga = 1e9;
  Rates shared;
  shared.attention_half_tokens = z.attention_half_tokens;
  shared.host_update_bytes = told(meter.rate(&Rates::host_update_bytes, 16, updates(z)), "updates on the host", kGiga, "GB/s");
  shared.to_host_bytes = shared.to_device_bytes = told(meter.rate(&Rates::to_host_bytes, 16, copies(z)), "copies, both ways at once, each", kGiga, "GB/s");
  if (!what.cuda) shared.to_host_bytes *= 2, shared.to_device_bytes *= 2;  // by the same cores: each way is counted by itself
  shared.sequence_bytes = shared.node_bytes = shared.gather_bytes = shared.scatter_bytes = told(exchanged_bytes_a_second(), "between two ranks", kGiga, "GB/s");
  Json out;
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    Rates r = shared;
    const char* const name = dtype == Dtype::kF32 ? "fp32" : "bf16";
    if (!what.cuda || dtype == Dtype::kBf16) {
      r.gemm_flops = told(meter.rate(&Rates::gemm_flops, 16, products(z, dtype)), fmt::format("products, {}", name), kGiga, "GFLOP/s");
      r.attention_forward_flops = told(meter.rate(&Rates::attention_forward_flops, z.attention_tokens, attention(z, schedule, dtype, false)), fmt::format("attention, {}", name), kGiga, "GFLOP/s");
      r.attention_backward_flops = told(meter.rate(&Rates::attention_backward_flops, z.attention_tokens, attention(z, schedule, dtype, true)), fmt::format("attention backward, {}", name), kGiga, "GFLOP/s");
      r.device_bytes = told(meter.rate(&Rates::device_bytes, z.tokens, elementwise(z, dtype)), fmt::format("all else, {}", name), kGiga, "GB/s");
    }
    out[name] = plan::to_json(r);
  }
  out["disks"] = Json::object();
  for (const std::string& folder : what.folders) out["disks"][folder] = told(disk_bytes_a_second(folder), folder, kGiga, "GB/s");
  return out;
}

}  // namespace uly::train
