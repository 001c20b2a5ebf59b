// The tiers of a GPU engine: what travels arrives bit for bit, in whatever order it is waited for; updates on the host are those
// on the device; nothing hangs where the GPU waits for the host; what fails beside is thrown. Without a GPU nothing is run, exit 0.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <numeric>
#include <random>

#include "base/check.h"
#include "base/shapes.h"
#include "comm/world.h"
#include "engine/make.h"
#include "kernels/optimizer.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "layout.h"

namespace uly::engine {
namespace {

constexpr unsigned kPatience = 540;  // seconds; what hangs ends by a signal

class TiersGpuTest : public testing::Test {
 protected:
  TiersGpuTest() : worlds_(comm::World::threads(1)), sequence_(worlds_[0].subgroup({0}, "sequence")) {
    CudaOptions options{.scratch_bytes = ops::kernel_scratch_bytes(4096), .disk_folders = {std::filesystem::temp_directory_path()}};
    engine_ = make_cuda_engine(launch::program_folder(), worlds_[0].all(), *sequence_, options);
  }

  Engine& engine() { return *engine_; }
  // The buffers of a program that has begun; the layout stays until the next does.
  std::vector<Buffer> begin(const Layout& layout) {
    engine_->begin_step(layout.places(), {}, 0);
    return layout.make(*engine_);
  }
  std::vector<Buffer> begin_run(const Layout& layout) {
    engine_->begin_run(layout.places());
    return layout.make(*engine_);
  }
  Bytes read(const Buffer& b) {
    Bytes bytes(static_cast<size_t>(b.bytes()));
    engine_->read(bytes.data(), b);
    return bytes;
  }
  void write(const Buffer& b, const Bytes& bytes) { engine_->write(b, bytes.data()); }
  void move_now(const Buffer& y, const Buffer& x) { engine_->wait(engine_->move(y, x)); }

  const Layout nothing_{Life::kStep};
  std::vector<comm::World> worlds_;
  std::unique_ptr<comm::Group> sequence_;
  std::unique_ptr<Engine> engine_;
};

std::vector<size_t> shuffled(size_t n, std::mt19937& random) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

constexpr int64_t kMiB = int64_t{1} << 20;

// Many of many sizes under way at once; one is larger than the ring between GPU and disk.
std::vector<int64_t> sizes() { return {1, 4095, 4096, 4097, 100'000, 8 * kMiB, 8 * kMiB + 12, 33 * kMiB - 1, 150 * kMiB + 5, 3 * kMiB, 64, 40 * kMiB, 1 * kMiB, 7, 32 * kMiB, 65 * kMiB + 4096}; }

class RoundTrip : public TiersGpuTest, public testing::WithParamInterface<Tier> {};

// Out and back, waits in random order; the source is overwritten as soon as its wait is past, and what came back is copied on
// the device as soon as its is. Twice in the same places, in programs that nobody waits between.
TEST_P(RoundTrip, IsExact) {
  const std::vector<int64_t> bytes = sizes();
  Layout run(Life::kRun), step(Life::kStep);
  std::vector<size_t> source, kept, away, back;
  for (const int64_t n : bytes) source.push_back(run.add({.columns = n})), kept.push_back(run.add({.columns = n}));
  for (const int64_t n : bytes) away.push_back(step.add({.tier = GetParam(), .columns = n})), back.push_back(step.add({.columns = n}));
  const std::vector<Buffer> r = begin_run(run);
  std::mt19937 random(1);
  for (int round = 0; round < 2; ++round) {
    std::vector<Bytes> values;
    for (size_t i = 0; i < bytes.size(); ++i) values.push_back(noise(bytes[i], static_cast<uint64_t>(100 * round) + i)), write(r[source[i]], values[i]);
    for (int program = 0; program < 2; ++program) {
      const std::vector<Buffer> s = begin(step);
      std::vector<ops::Event> going(bytes.size()), coming(bytes.size());
      for (const size_t i : shuffled(bytes.size(), random)) going[i] = engine().move(s[away[i]], r[program == 0 ? source[i] : kept[i]]);
      for (const size_t i : shuffled(bytes.size(), random)) {
        engine().wait(going[i]);
        engine().zero(r[program == 0 ? source[i] : kept[i]]);
      }
      for (const size_t i : shuffled(bytes.size(), random)) coming[i] = engine().move(s[back[i]], s[away[i]]);
      for (const size_t i : shuffled(bytes.size(), random)) {
        engine().wait(coming[i]);
        engine().copy(r[kept[i]], s[back[i]]);
        engine().zero(s[back[i]]);
      }
    }
    for (size_t i = 0; i < bytes.size(); ++i) EXPECT_TRUE(read(r[kept[i]]) == values[i]) << bytes[i] << " bytes";
    for (size_t i = 0; i < bytes.size(); ++i) EXPECT_TRUE(read(r[source[i]]) == Bytes(static_cast<size_t>(bytes[i]))) << bytes[i] << " bytes";
  }
}

INSTANTIATE_TEST_SUITE_P(Tiers, RoundTrip, testing::Values(Tier::kHost, Tier::kDisk), [](const auto& info) { return std::string(ops::name_of(info.param)); });

// One tensor through every tier and back, each move on the heels of the one before; out and back again and again in the same
// places, so that any that came early or late would show.
TEST_F(TiersGpuTest, MovesFollowEachOther) {
  constexpr int64_t kBytes = 20 * kMiB + 24;
  constexpr int kTimes = 12;
  Layout run(Life::kRun), step(Life::kStep);
  std::vector<size_t> sources, results;
  for (int i = 0; i < kTimes; ++i) sources.push_back(run.add({.columns = kBytes})), results.push_back(run.add({.columns = kBytes}));
  const size_t here = step.add({.columns = kBytes}), host = step.add({.tier = Tier::kHost, .columns = kBytes}), disk = step.add({.tier = Tier::kDisk, .columns = kBytes}), other = step.add({.tier = Tier::kHost, .columns = kBytes});
  const std::vector<Buffer> r = begin_run(run);
  std::vector<Bytes> values;
  for (int i = 0; i < kTimes; ++i) values.push_back(noise(kBytes, static_cast<uint64_t>(i))), write(r[sources[static_cast<size_t>(i)]], values.back());
  const std::vector<Buffer> s = begin(step);
  for (size_t i = 0; i < kTimes; ++i) {
    engine().copy(s[here], r[sources[i]]);
    move_now(s[host], s[here]);
    engine().zero(s[here]);
    move_now(s[disk], s[host]);
    move_now(s[other], s[disk]);
    move_now(s[here], s[other]);
    move_now(s[disk], s[here]);
    engine().zero(s[here]);
    move_now(s[here], s[disk]);
    engine().copy(r[results[i]], s[here]);
  }
  for (size_t i = 0; i < kTimes; ++i) EXPECT_TRUE(read(r[results[i]]) == values[i]) << i;
}

TEST_F(TiersGpuTest, ReadsAndWritesEveryTier) {
  constexpr int64_t kBytes = 70 * kMiB + 8;
  for (const Life life : {Life::kRun, Life::kStep}) {
    Layout layout(life);
    std::vector<size_t> at;
    for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kDisk}) at.push_back(layout.add({.tier = tier, .columns = kBytes}));
    const std::vector<Buffer> b = life == Life::kRun ? begin_run(layout) : begin(layout);
    for (const size_t i : at) {
      EXPECT_TRUE(life == Life::kStep || read(b[i]) == Bytes(static_cast<size_t>(kBytes))) << "what lives between steps is zero at first";
      const Bytes value = noise(kBytes, i);
      write(b[i], value);
      EXPECT_TRUE(read(b[i]) == value);
      const Bytes part = noise(8192, 7);
      write(b[i].column_range(16 * kMiB, 8192), part);
      EXPECT_TRUE(read(b[i].column_range(16 * kMiB, 8192)) == part);
      EXPECT_TRUE(read(b[i].column_range(0, 16 * kMiB)) == Bytes(value.begin(), value.begin() + 16 * kMiB));
    }
  }
}

// Though nobody has waited for a move.
TEST_F(TiersGpuTest, ReadsAndWritesWaitForWhatWasStarted) {
  constexpr int64_t kBytes = 90 * kMiB;
  Layout step(Life::kStep);
  std::vector<size_t> at;
  for (const Tier tier : {Tier::kHost, Tier::kDisk}) at.push_back(step.add({.columns = kBytes})), at.push_back(step.add({.tier = tier, .columns = kBytes}));
  const std::vector<Buffer> s = begin(step);
  for (size_t i = 0; i < at.size(); i += 2) {
    const Buffer here = s[at[i]], there = s[at[i + 1]];
    const Bytes value = noise(kBytes, i), other = noise(kBytes, i + 1);
    write(here, value);
    engine().move(there, here);
    EXPECT_TRUE(read(there) == value);
    engine().zero(here);
    engine().move(here, there);
    write(there, other);
    EXPECT_TRUE(read(here) == value);
    engine().move(here, there);
    EXPECT_TRUE(read(here) == other);
  }
}

// --- updates

struct States {
  std::vector<Buffer> weight, master, m, v, gradient;  // by tier: device, host
  std::vector<Buffer> norm, loss;
};

class HostUpdate : public TiersGpuTest, public testing::WithParamInterface<int> {
 protected:
  static constexpr int64_t kCount = 1'000'000;
  enum Masters { kOne, kFp32OfBf16, kSplit };
  std::vector<Buffer> run_;

  // The same numbers in both tiers.
  States states(Layout& run) {
    const auto masters = static_cast<Masters>(GetParam());
    const Dtype weight = masters == kOne ? Dtype::kF32 : Dtype::kBf16, master = masters == kSplit ? Dtype::kI16 : Dtype::kF32;
    std::vector<std::vector<size_t>> at;
    for (const Tier tier : {Tier::kDevice, Tier::kHost}) {
      std::vector<size_t>& t = at.emplace_back();
      for (const Dtype dtype : {weight, master, Dtype::kF32, Dtype::kF32, Dtype::kF32}) t.push_back(run.add({.tier = tier, .dtype = dtype, .columns = kCount}));
      for (int i = 0; i < 2; ++i) t.push_back(run.add({.tier = tier, .dtype = Dtype::kF64, .columns = 1}));
    }
    const std::vector<Buffer> b = run_ = begin_run(run);
    std::vector<float> w(kCount), g(kCount), m(kCount), v(kCount);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < w.size(); ++i) w[i] = normal(random), g[i] = normal(random), m[i] = 0.1f * normal(random), v[i] = std::abs(normal(random));
    std::vector<kernels::Bf16> rounded;
    std::vector<uint16_t> upper;
    std::vector<int16_t> low;
    for (const float x : w) {
      const kernels::SplitFloat split = kernels::split(x);
      rounded.push_back(kernels::to_bf16(x)), upper.push_back(split.weight), low.push_back(split.low);
    }
    States s;
    for (const std::vector<size_t>& t : at) {
      s.weight.push_back(b[t[0]]), s.master.push_back(masters == kOne ? b[t[0]] : b[t[1]]), s.m.push_back(b[t[2]]), s.v.push_back(b[t[3]]), s.gradient.push_back(b[t[4]]), s.norm.push_back(b[t[5]]), s.loss.push_back(b[t[6]]);
      if (masters == kSplit) engine().write(b[t[0]], upper.data()), engine().write(b[t[1]], low.data());
      else engine().write(s.master.back(), w.data());
      if (masters == kFp32OfBf16) engine().write(b[t[0]], rounded.data());
      engine().write(b[t[2]], m.data()), engine().write(b[t[3]], v.data()), engine().write(b[t[4]], g.data());
      const double norm = 123.456, loss = 2.5;
      engine().write(s.norm.back(), &norm), engine().write(s.loss.back(), &loss);
    }
    return s;
  }
  // In several ranges, of which one decays.
  std::vector<ops::Event> update(const States& s, size_t tier) {
    std::vector<ops::Event> events;
    for (const ops::UpdateRange& range : {ops::UpdateRange{0, 600'004, true}, ops::UpdateRange{600'004, 12, false}, ops::UpdateRange{600'016, kCount - 600'016, true}})
      events.push_back(engine().adamw(s.weight[tier], s.master[tier], s.m[tier], s.v[tier], s.gradient[tier], s.norm[tier], s.loss[tier], range));
    return events;
  }
  void expect_same(const States& s) {
    EXPECT_TRUE(read(s.weight[0]) == read(s.weight[1]));
    EXPECT_TRUE(read(s.master[0]) == read(s.master[1]));
    EXPECT_TRUE(read(s.m[0]) == read(s.m[1]));
    EXPECT_TRUE(read(s.v[0]) == read(s.v[1]));
  }
  void set_update(int64_t step) { engine().set_update({.learning_rate = 1e-2, .weight_decay = 0.1, .clip = 1.0, .step = step}); }
};

TEST_P(HostUpdate, IsThatOfTheDevice) {
  Layout run(Life::kRun);
  const States s = states(run);
  const Bytes before = read(s.weight[0]);
  for (int64_t step = 1; step <= 3; ++step) {
    begin(nothing_);
    set_update(step);
    for (const ops::Event e : update(s, 1)) engine().wait(e);
    for (const ops::Event e : update(s, 0)) engine().wait(e);
    expect_same(s);
  }
  EXPECT_FALSE(read(s.weight[0]) == before);
  const double infinite = std::numeric_limits<double>::infinity();
  engine().write(s.norm[1], &infinite);
  const Bytes after = read(s.weight[1]);
  for (const ops::Event e : update(s, 1)) engine().wait(e);
  EXPECT_TRUE(read(s.weight[1]) == after);
}

// As in a step: gradients leave, the host updates, weights come; nobody waits between, and what is free is overwritten at once.
TEST_P(HostUpdate, FollowsGradientsAndIsFollowedByWeights) {
  Layout run(Life::kRun);
  const Dtype dtype = GetParam() == kOne ? Dtype::kF32 : Dtype::kBf16;
  const size_t weight_at = run.add({.dtype = dtype, .columns = kCount}), gradient_at = run.add({.dtype = Dtype::kF32, .columns = kCount});
  const States s = states(run);
  const Buffer weight = run_[weight_at], gradient = run_[gradient_at];
  for (int64_t step = 1; step <= 4; ++step) {
    begin(nothing_);
    set_update(step);
    engine().copy(gradient, s.gradient[0]);
    move_now(s.gradient[1], gradient);
    engine().zero(gradient);
    const std::vector<ops::Event> updated = update(s, 1);
    update(s, 0);
    for (const ops::Event e : updated) engine().wait(e);
    engine().zero(weight);
    move_now(weight, s.weight[1]);
  }
  expect_same(s);
  EXPECT_TRUE(read(weight) == read(s.weight[0]));
}

INSTANTIATE_TEST_SUITE_P(Masters, HostUpdate, testing::Values(0, 1, 2), [](const auto& info) { return std::string(info.param == 0 ? "one" : info.param == 1 ? "fp32_of_bf16" : "split"); });

// --- what would hang

// A kernel's first launch loads it, and waits for the GPU with CUDA's lock in hand, while the GPU waits for the disk.
TEST_F(TiersGpuTest, KernelsAreLoadedWhileTheGpuWaitsForTheDisk) {
  constexpr int64_t kBytes = 300 * kMiB;
  Layout step(Life::kStep);
  const size_t here = step.add({.columns = kBytes}), disk = step.add({.tier = Tier::kDisk, .columns = kBytes});
  const size_t wide = step.add({.dtype = Dtype::kBf16, .columns = 256, .rows = 64}), narrow = step.add({.dtype = Dtype::kBf16, .columns = 128, .rows = 64}), floats = step.add({.dtype = Dtype::kF32, .columns = 128, .rows = 64});
  const size_t weight = step.add({.dtype = Dtype::kBf16, .columns = 128}), rstd = step.add({.dtype = Dtype::kF32, .columns = 1, .rows = 64}), total = step.add({.dtype = Dtype::kF64, .columns = 1}), sums = step.add({.dtype = Dtype::kF32, .columns = 128});
  const std::vector<Buffer> s = begin(step);
  for (int round = 0; round < 3; ++round) {
    move_now(s[disk], s[here]);
    move_now(s[here], s[disk]);
    if (round == 0) engine().swiglu(s[narrow], s[wide]), engine().copy(s[floats], s[narrow]);
    if (round == 1) engine().rms_norm(s[narrow], s[rstd], s[narrow], s[weight], 1e-5), engine().squared_norm(s[total], s[floats]);
    if (round == 2) engine().add_bias(s[narrow], s[weight]), engine().bias_grad(s[sums], s[narrow]);
  }
  engine().finish();
}

// More than a queue holds of kernels, and of moves, behind a wait for the disk.
TEST_F(TiersGpuTest, QueuesAreFullWhileTheGpuWaitsForTheDisk) {
  constexpr int64_t kBytes = 200 * kMiB, kLittle = 4096;
  constexpr size_t kMoves = 600;
  Layout run(Life::kRun), step(Life::kStep);
  const size_t here = step.add({.columns = kBytes}), disk = step.add({.tier = Tier::kDisk, .columns = kBytes});
  std::vector<size_t> at;
  for (size_t i = 0; i < kMoves; ++i) at.push_back(step.add({.tier = Tier::kDisk, .columns = kLittle}));
  const size_t little = run.add({.columns = kLittle}), back = run.add({.columns = kLittle});
  const size_t y = step.add({.dtype = Dtype::kBf16, .columns = 128, .rows = 64}), bias = step.add({.dtype = Dtype::kBf16, .columns = 128});
  const std::vector<Buffer> r = begin_run(run), s = begin(step);
  const Bytes value = noise(kLittle, 5);
  write(r[little], value);
  move_now(s[disk], s[here]);
  move_now(s[here], s[disk]);
  for (int i = 0; i < 5000; ++i) engine().add_bias(s[y], s[bias]);
  std::vector<ops::Event> events;
  for (const size_t i : at) events.push_back(engine().move(s[i], r[little]));
  for (const ops::Event e : events) engine().wait(e);
  engine().zero(r[little]);
  for (int i = 0; i < 3000; ++i) engine().add_bias(s[y], s[bias]);
  for (const size_t i : at) move_now(r[back], s[i]);
  EXPECT_TRUE(read(r[back]) == value);
}

TEST_F(TiersGpuTest, ProgramsOfNothing) {
  for (int i = 0; i < 3; ++i) begin(nothing_);
  engine().finish();
}

TEST_F(TiersGpuTest, TellsWhatTookTime) {
  constexpr int64_t kBytes = 40 * kMiB;
  Layout run(Life::kRun), step(Life::kStep);
  std::vector<size_t> at;
  for (int i = 0; i < 4; ++i) at.push_back(run.add({.tier = Tier::kHost, .dtype = Dtype::kF32, .columns = kMiB}));
  const size_t scalar = run.add({.tier = Tier::kHost, .dtype = Dtype::kF64, .columns = 1});
  const size_t here = step.add({.columns = kBytes}), host = step.add({.tier = Tier::kHost, .columns = kBytes}), disk = step.add({.tier = Tier::kDisk, .columns = kBytes});
  const std::vector<Buffer> r = begin_run(run), s = begin(step);
  engine().time(true);
  move_now(s[host], s[here]), move_now(s[here], s[host]), move_now(s[disk], s[here]);
  engine().wait(engine().adamw(r[at[0]], r[at[0]], r[at[1]], r[at[2]], r[at[3]], r[scalar], r[scalar], {0, kMiB, true}));
  engine().finish();
  const std::map<std::string, double> seconds = engine().seconds();
  for (const char* name : {"to_host", "to_device", "disk", "host_update"}) {
    ASSERT_TRUE(seconds.contains(name)) << name;
    EXPECT_GT(seconds.at(name), 0) << name;
    EXPECT_LT(seconds.at(name), 60) << name;
  }
  EXPECT_EQ(engine().held_bytes()[static_cast<size_t>(Tier::kDevice)], run.places().of(Tier::kDevice) + step.places().of(Tier::kDevice));
  EXPECT_GE(engine().held_bytes()[static_cast<size_t>(Tier::kDisk)], kBytes);
}

// Files may not grow, nor be written, beyond what the process is allowed: a disk that fails in the middle.
class Allowed {
 public:
  explicit Allowed(rlim_t bytes) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit now{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~Allowed() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

TEST_F(TiersGpuTest, AFailingDiskIsThrownAndNothingHangs) {
  constexpr int64_t kBytes = 150 * kMiB;
  Layout step(Life::kStep);
  const size_t here = step.add({.columns = kBytes}), disk = step.add({.tier = Tier::kDisk, .columns = kBytes}), host = step.add({.tier = Tier::kHost, .columns = kBytes});
  const std::vector<Buffer> s = begin(step);
  {
    const Allowed allowed(static_cast<rlim_t>(50 * kMiB));
    const auto program = [&] {
      move_now(s[disk], s[here]);
      move_now(s[here], s[disk]);
      move_now(s[host], s[disk]);
      engine().finish();
    };
    EXPECT_THROW(program(), DeviceError);
  }
  EXPECT_THROW(engine().finish(), DeviceError) << "what has failed stays so";
  EXPECT_THROW(engine().move(s[host], s[here]), DeviceError);
  EXPECT_THROW(read(s[here]), DeviceError);
}

// An engine may go at any time.
TEST_F(TiersGpuTest, EndsWithMovesUnderWay) {
  constexpr int64_t kBytes = 100 * kMiB;
  Layout step(Life::kStep);
  const size_t here = step.add({.columns = kBytes}), disk = step.add({.tier = Tier::kDisk, .columns = kBytes}), host = step.add({.tier = Tier::kHost, .columns = kBytes});
  const std::vector<Buffer> s = begin(step);
  engine().move(s[disk], s[here]);
  engine().move(s[host], s[here]);
  engine_.reset();
}

}  // namespace
}  // namespace uly::engine

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (uly::launch::ask_gpus().list.empty()) {
    std::puts("no GPU: nothing was run");
    return 0;
  }
  std::signal(SIGXFSZ, SIG_IGN);
  alarm(uly::engine::kPatience);
  return RUN_ALL_TESTS();
}
