// Exchanges by NCCL, from GPU to GPU: what every rank gets is what the others sent, bit for bit, in the sequence's group and in the
// world's; compute is ordered before and after without a wait of the launching thread; a peer that does not come is an error and no
// wait without end. One rank a GPU, up to four, each a thread; ULYSSES_TEST_RANKS: others, which share GPUs where NCCL allows it.
// Without a GPU nothing is run, exit 0.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <thread>

#include "base/check.h"
#include "comm/world.h"
#include "engine/make.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "launch/nccl.h"
#include "layout.h"

namespace uly::engine {
namespace {

using ops::Group;

constexpr unsigned kPatience = 540;  // seconds; what hangs ends by a signal

int64_t num_gpus() { return static_cast<int64_t>(launch::ask_gpus().list.size()); }

int64_t num_ranks() {
  if (const char* text = std::getenv("ULYSSES_TEST_RANKS")) return std::max<int64_t>(1, std::atoll(text));
  const int64_t gpus = std::min<int64_t>(4, num_gpus());
  return gpus == 3 ? 2 : gpus;
}

// One rank of a test, in a thread of its own.
struct Rank {
  int64_t rank = 0, size = 1, P = 1;
  Engine& engine;

  // Within a group: of it, my place in it, and the world's rank of its p-th.
  int64_t size_of(Group g) const { return g == Group::kWorld ? size : P; }
  int64_t mine(Group g) const { return g == Group::kWorld ? rank : rank % P; }
  int64_t rank_of(Group g, int64_t p) const { return g == Group::kWorld ? p : rank / P * P + p; }

  std::vector<Buffer> begin(const Layout& layout) const {
    engine.begin_step(layout.places(), {}, 0);
    return layout.make(engine);
  }
  Bytes read(const Buffer& b) const {
    Bytes bytes(static_cast<size_t>(b.bytes()));
    engine.read(bytes.data(), b);
    return bytes;
  }
};

void on_every_rank(const std::function<void(const Rank&)>& test, std::chrono::milliseconds timeout = std::chrono::minutes(2)) {
  const int64_t size = num_ranks(), P = size >= 4 && size % 2 == 0 ? 2 : size, gpus = num_gpus();
  std::vector<comm::World> worlds = comm::World::threads(size);
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < size; ++r)
    threads.emplace_back([&, r] {
      try {
        comm::World& world = worlds[static_cast<size_t>(r)];
        std::vector<int64_t> peers(static_cast<size_t>(P));
        std::iota(peers.begin(), peers.end(), r / P * P);
        const auto sequence = world.subgroup(peers, "sequence");
        const CudaOptions options{.device = static_cast<int>(r % gpus), .scratch_bytes = ops::kernel_scratch_bytes(4096), .nccl = true, .exchange_timeout = timeout};
        const std::unique_ptr<Engine> engine = make_cuda_engine(launch::program_folder(), world.all(), *sequence, options);
        test({.rank = r, .size = size, .P = P, .engine = *engine});
      } catch (const std::exception& e) {
        ADD_FAILURE() << "rank " << r << ": " << e.what();
      }
    });
  for (std::thread& t : threads) t.join();
}

uint64_t seed_of(int64_t from, int64_t to, int64_t salt) { return static_cast<uint64_t>((from * 64 + to) * 1000 + salt + 1); }

Bytes joined(const std::vector<Bytes>& parts) {
  Bytes all;
  for (const Bytes& p : parts) all.insert(all.end(), p.begin(), p.end());
  return all;
}

// Both groups, `bytes(from, to)` between two ranks of the world.
void all_to_all(const Rank& r, Group g, int64_t salt, const std::function<int64_t(int64_t, int64_t)>& bytes) {
  std::vector<int64_t> sent, received;
  std::vector<Bytes> out, expected;
  for (int64_t p = 0; p < r.size_of(g); ++p) {
    const int64_t peer = r.rank_of(g, p);
    sent.push_back(bytes(r.rank, peer)), received.push_back(bytes(peer, r.rank));
    out.push_back(noise(sent.back(), seed_of(r.rank, peer, salt)));
    expected.push_back(noise(received.back(), seed_of(peer, r.rank, salt)));
  }
  Layout step(Life::kStep);
  const size_t from = step.add({.columns = std::accumulate(sent.begin(), sent.end(), int64_t{0})}), to = step.add({.columns = std::accumulate(received.begin(), received.end(), int64_t{0})});
  const std::vector<Buffer> s = r.begin(step);
  r.engine.write(s[from], joined(out).data());
  r.engine.wait(r.engine.all_to_all(s[to], s[from], g, received, sent));
  EXPECT_TRUE(r.read(s[to]) == joined(expected)) << "rank " << r.rank << ", group " << static_cast<int>(g) << ", " << salt;
}

TEST(NcclGpuTest, AllToAllBringsWhatWasSent) {
  on_every_rank([](const Rank& r) {
    for (const Group g : {Group::kSequence, Group::kWorld}) {
      int64_t salt = 0;
      for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{4097}, int64_t{1'000'003}, int64_t{64} << 20}) all_to_all(r, g, ++salt, [&](int64_t, int64_t) { return bytes; });
      all_to_all(r, g, 10, [](int64_t from, int64_t to) { return (from * 7 + to * 3) % 5 * 10'007 + to; });  // uneven, some nothing
      all_to_all(r, g, 11, [](int64_t from, int64_t to) { return from < to ? int64_t{123'457} : int64_t{0}; });  // one way only
    }
  });
}

TEST(NcclGpuTest, AllToAllBeyondTwoGiB) {
  constexpr int64_t kLarge = (int64_t{1} << 31) + 4097;
  const int64_t gpus = num_gpus(), ranks_a_gpu = (num_ranks() + gpus - 1) / gpus;
  for (const launch::Gpu& gpu : launch::ask_gpus().list)
    if (gpu.free_bytes < ranks_a_gpu * (4 * kLarge)) GTEST_SKIP() << "too little memory";
  on_every_rank([](const Rank& r) { all_to_all(r, Group::kWorld, 20, [&](int64_t from, int64_t to) { return to == (from + 1) % r.size ? kLarge : int64_t{3}; }); });
}

TEST(NcclGpuTest, AllGatherAndScatterBringEveryRanksShard) {
  on_every_rank([](const Rank& r) {
    for (const Group g : {Group::kSequence, Group::kWorld})
      for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{777}, int64_t{1'000'003}, int64_t{48} << 20}) {
        const int64_t size = r.size_of(g);
        Layout step(Life::kStep);
        const size_t shard = step.add({.columns = bytes}), whole = step.add({.columns = bytes * size}), pieces = step.add({.columns = bytes * size});
        std::vector<Bytes> gathered, scattered;
        for (int64_t p = 0; p < size; ++p) {
          gathered.push_back(noise(bytes, seed_of(r.rank_of(g, p), 63, bytes)));
          const Bytes of_peer = noise(bytes * size, seed_of(r.rank_of(g, p), 62, bytes));
          scattered.emplace_back(of_peer.begin() + r.mine(g) * bytes, of_peer.begin() + (r.mine(g) + 1) * bytes);
        }
        const std::vector<Buffer> s = r.begin(step);
        r.engine.write(s[shard], noise(bytes, seed_of(r.rank, 63, bytes)).data());
        r.engine.wait(r.engine.all_gather(s[whole], s[shard], g));
        EXPECT_TRUE(r.read(s[whole]) == joined(gathered)) << "rank " << r.rank << ", " << bytes << " bytes gathered";
        r.engine.write(s[whole], noise(bytes * size, seed_of(r.rank, 62, bytes)).data());
        r.engine.wait(r.engine.scatter(s[pieces], s[whole], g));
        EXPECT_TRUE(r.read(s[pieces]) == joined(scattered)) << "rank " << r.rank << ", " << bytes << " bytes scattered";
      }
  });
}

TEST(NcclGpuTest, AllReduceAddsInTheOrderOfRanks) {
  on_every_rank([](const Rank& r) {
    const auto value = [](int64_t rank, int64_t i) { return 1.0 / static_cast<double>(3 * rank + i + 1) + (i == 2 ? 1e17 : 0); };
    for (const Group g : {Group::kSequence, Group::kWorld}) {
      Layout step(Life::kStep);
      const size_t x = step.add({.dtype = Dtype::kF64, .columns = 5});
      const std::vector<Buffer> s = r.begin(step);
      std::vector<double> mine, expected(5, 0.0), found(5);
      for (int64_t i = 0; i < 5; ++i) {
        mine.push_back(value(r.rank, i));
        for (int64_t p = 0; p < r.size_of(g); ++p) expected[static_cast<size_t>(i)] = p == 0 ? value(r.rank_of(g, p), i) : expected[static_cast<size_t>(i)] + value(r.rank_of(g, p), i);
      }
      r.engine.write(s[x], mine.data());
      r.engine.wait(r.engine.all_reduce(s[x], g));
      r.engine.read(found.data(), s[x]);
      EXPECT_EQ(found, expected) << "rank " << r.rank;
    }
  });
}

// Many under way in both groups at once, none of which the launching thread waits for: what is sent has just been written by compute,
// and is overwritten as soon as its wait is past; what has come is copied as soon as its is. Twice in the same places.
TEST(NcclGpuTest, ExchangesAreOrderedWithCompute) {
  constexpr int kExchanges = 40;
  on_every_rank([](const Rank& r) {
    Layout run(Life::kRun), step(Life::kStep);
    std::vector<size_t> source, kept, sent, received;
    const auto group = [](int i) { return i % 2 == 0 ? Group::kSequence : Group::kWorld; };
    const auto floats = [](int i) { return int64_t{1} << (4 + i % 19); };
    for (int i = 0; i < kExchanges; ++i) {
      source.push_back(run.add({.dtype = Dtype::kF32, .columns = floats(i)})), kept.push_back(run.add({.dtype = Dtype::kF32, .columns = floats(i) * r.size_of(group(i))}));
      sent.push_back(step.add({.dtype = Dtype::kF32, .columns = floats(i)})), received.push_back(step.add({.dtype = Dtype::kF32, .columns = floats(i) * r.size_of(group(i))}));
    }
    r.engine.begin_run(run.places());
    const std::vector<Buffer> k = run.make(r.engine);
    const auto values = [&](int64_t rank, int i) {
      std::vector<float> v(static_cast<size_t>(floats(i)));
      for (size_t j = 0; j < v.size(); ++j) v[j] = static_cast<float>(rank * 1000 + i) + static_cast<float>(j % 997) / 1024;
      return v;
    };
    for (int i = 0; i < kExchanges; ++i) r.engine.write(k[source[static_cast<size_t>(i)]], values(r.rank, i).data());
    for (int round = 0; round < 2; ++round) {
      const std::vector<Buffer> s = r.begin(step);
      std::vector<ops::Event> events;
      for (size_t i = 0; i < kExchanges; ++i) {
        r.engine.copy(s[sent[i]], k[source[i]]);
        events.push_back(r.engine.all_gather(s[received[i]], s[sent[i]], group(static_cast<int>(i))));
      }
      for (size_t i = kExchanges; i-- > 0;) {
        r.engine.wait(events[i]);
        r.engine.zero(s[sent[i]]);
        r.engine.copy(k[kept[i]], s[received[i]]);
        r.engine.zero(s[received[i]]);
      }
    }
    for (int i = 0; i < kExchanges; ++i) {
      std::vector<float> expected, found(static_cast<size_t>(floats(i) * r.size_of(group(i))));
      for (int64_t p = 0; p < r.size_of(group(i)); ++p) {
        const std::vector<float> v = values(r.rank_of(group(i), p), i);
        expected.insert(expected.end(), v.begin(), v.end());
      }
      r.engine.read(found.data(), k[kept[static_cast<size_t>(i)]]);
      EXPECT_TRUE(found == expected) << "rank " << r.rank << ", exchange " << i;
    }
  });
}

TEST(NcclGpuTest, APeerThatDoesNotComeIsNamedByAnError) {
  if (num_ranks() < 2) GTEST_SKIP() << "one rank waits for nobody";
  on_every_rank(
      [](const Rank& r) {
        if (r.rank > 0) return std::this_thread::sleep_for(std::chrono::seconds(20));
        Layout step(Life::kStep);
        const size_t shard = step.add({.columns = 1 << 20}), whole = step.add({.columns = r.size << 20});
        const std::vector<Buffer> s = r.begin(step);
        try {
          r.engine.wait(r.engine.all_gather(s[whole], s[shard], Group::kWorld));
          r.engine.finish();
          ADD_FAILURE() << "it ended";
        } catch (const DeviceError& e) {
          const std::string text = e.what();
          EXPECT_NE(text.find("rank 0: all_gather in group 'world'"), std::string::npos) << text;
        }
      },
      std::chrono::seconds(5));
}

}  // namespace
}  // namespace uly::engine

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (uly::launch::ask_gpus().list.empty()) {
    std::puts("no GPU: nothing was run");
    return 0;
  }
  uly::launch::find_nccl();  // before torch: LD_LIBRARY_PATH's
  uly::launch::prepare_nccl(uly::engine::num_ranks() > uly::engine::num_gpus(), true);
  alarm(uly::engine::kPatience);
  return RUN_ALL_TESTS();
}
