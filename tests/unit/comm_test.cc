#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <thread>

#include "base/check.h"
#include "comm/gloo.h"
#include "comm/heartbeat.h"
#include "comm/world.h"

namespace uly::comm {
namespace {

using std::chrono::milliseconds;

// Runs `body` as each rank in a thread of its own; a rank's failure fails the test.
void run_ranks(int64_t size, const std::function<void(World&)>& body, int64_t piece_bytes = kPieceBytes) {
  std::vector<World> worlds = World::threads(size, milliseconds(20000), piece_bytes);
  std::vector<std::thread> threads;
  for (World& world : worlds)
    threads.emplace_back([&] {
      try {
        body(world);
      } catch (const std::exception& e) {
        ADD_FAILURE() << "rank " << world.rank() << ": " << e.what();
      }
    });
  for (std::thread& t : threads) t.join();
}

class CommTest : public testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Ranks, CommTest, testing::Values(1, 2, 3, 4));

TEST_P(CommTest, AllToAllDeliversEachBlockInOrderOfRank) {
  const int64_t P = GetParam();
  run_ranks(P, [&](World& w) {
    const int64_t n = 5;
    std::vector<uint16_t> send(static_cast<size_t>(P * n)), receive(send.size());  // bf16 bits: only bytes matter
    for (int64_t p = 0; p < P; ++p)
      for (int64_t i = 0; i < n; ++i) send[static_cast<size_t>(p * n + i)] = static_cast<uint16_t>(w.rank() * 1000 + p * 100 + i);
    const std::vector<int64_t> counts(static_cast<size_t>(P), n * 2);
    w.all().all_to_all(receive.data(), send.data(), counts, counts).wait();
    for (int64_t p = 0; p < P; ++p)
      for (int64_t i = 0; i < n; ++i) EXPECT_EQ(receive[static_cast<size_t>(p * n + i)], p * 1000 + w.rank() * 100 + i);
  });
}

// Sender p gives rank q (p * 7 + q * 3) % 5 bytes: some are none. In pieces of 2 bytes as in whole messages.
void uneven_all_to_all(World& w) {
  const int64_t P = w.size(), me = w.rank();
  const auto count = [](int64_t from, int64_t to) { return (from * 7 + to * 3) % 5; };
  std::vector<int64_t> in, out;
  std::vector<uint8_t> send, expected;
  for (int64_t p = 0; p < P; ++p) {
    in.push_back(count(p, me));
    out.push_back(count(me, p));
    for (int64_t i = 0; i < out.back(); ++i) send.push_back(static_cast<uint8_t>(me * 50 + p * 10 + i));
    for (int64_t i = 0; i < in.back(); ++i) expected.push_back(static_cast<uint8_t>(p * 50 + me * 10 + i));
  }
  std::vector<uint8_t> receive(expected.size());
  w.all().all_to_all(receive.data(), send.data(), in, out).wait();
  EXPECT_EQ(receive, expected);
}
TEST_P(CommTest, UnevenAllToAllMatchesItsCounts) { run_ranks(GetParam(), uneven_all_to_all); }
TEST_P(CommTest, MessagesInSeveralPiecesMatchWholeOnes) { run_ranks(GetParam(), uneven_all_to_all, 2); }

TEST_P(CommTest, AllGatherInPlaceAndOutOfPlaceAgree) {
  const int64_t P = GetParam();
  run_ranks(P, [&](World& w) {
    std::vector<int64_t> expected(static_cast<size_t>(P * 3)), whole(expected.size()), in_place(expected.size());
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<int64_t>(i) * 11;
    const int64_t* shard = expected.data() + w.rank() * 3;
    std::memcpy(in_place.data() + w.rank() * 3, shard, 24);
    w.all().all_gather(whole.data(), shard, 24).wait();
    w.all().all_gather(in_place.data(), in_place.data() + w.rank() * 3, 24).wait();
    EXPECT_EQ(whole, expected);
    EXPECT_EQ(in_place, expected);
  });
}

template <typename T>
void check_sum(World& w, int64_t count) {
  std::vector<T> x(static_cast<size_t>(count)), expected(x.size());
  for (int64_t i = 0; i < count; ++i) {
    const auto value = [&](int64_t rank) { return static_cast<T>(1.0 / static_cast<double>(3 + i + 17 * rank)); };
    x[static_cast<size_t>(i)] = value(w.rank());
    T total = value(0);
    for (int64_t p = 1; p < w.size(); ++p) total += value(p);
    expected[static_cast<size_t>(i)] = total;
  }
  w.all().all_reduce_sum(x.data(), count).wait();
  EXPECT_EQ(x, expected);
}
TEST_P(CommTest, AllReduceSumsInOrderOfRankBitForBit) {
  run_ranks(GetParam(), [](World& w) {
    for (int64_t count : {int64_t{0}, int64_t{1}, int64_t{5}, int64_t{100'003}}) {
      check_sum<float>(w, count);
      check_sum<double>(w, count);
    }
  });
}

TEST_P(CommTest, BroadcastCopiesTheRoot) {
  const int64_t P = GetParam();
  run_ranks(P, [&](World& w) {
    std::vector<int64_t> x(7, w.rank());
    w.all().broadcast(x.data(), 56, P - 1).wait();
    EXPECT_EQ(x, std::vector<int64_t>(7, P - 1));
  });
}

TEST_P(CommTest, TextsAndCountsReachEveryRank) {
  const int64_t P = GetParam();
  run_ranks(P, [&](World& w) {
    std::vector<std::string> expected;
    for (int64_t p = 0; p < P; ++p) expected.emplace_back(static_cast<size_t>(p * 4), static_cast<char>('a' + p));
    EXPECT_EQ(w.all().exchange(expected[static_cast<size_t>(w.rank())]), expected);
    EXPECT_EQ(w.all().sum({w.rank(), 1}), (std::vector<int64_t>{P * (P - 1) / 2, P}));
    EXPECT_EQ(w.all().max({w.rank(), -w.rank()}), (std::vector<int64_t>{P - 1, 0}));
    w.all().barrier();
  });
}

TEST_P(CommTest, SeveralMayBeInFlightAndBeWaitedForInAnyOrder) {
  const int64_t P = GetParam();
  run_ranks(P, [&](World& w) {
    constexpr int64_t kMany = 6, kBytes = 300'000;
    std::vector<std::vector<uint8_t>> shards, wholes;
    std::vector<Work> works;
    for (int64_t k = 0; k < kMany; ++k) {
      shards.emplace_back(kBytes, static_cast<uint8_t>(k * 16 + w.rank()));
      wholes.emplace_back(static_cast<size_t>(P * kBytes));
    }
    for (int64_t k = 0; k < kMany; ++k)
      works.push_back(w.all().all_gather(wholes[static_cast<size_t>(k)].data(), shards[static_cast<size_t>(k)].data(), kBytes));
    for (int64_t k = kMany - 1; k >= 0; --k) {
      works[static_cast<size_t>(k)].wait();
      for (int64_t p = 0; p < P; ++p) EXPECT_EQ(wholes[static_cast<size_t>(k)][static_cast<size_t>(p * kBytes + kBytes - 1)], k * 16 + p);
    }
  });
}

TEST(CommGroupsTest, SubgroupsWorkBesideTheWorld) {
  run_ranks(4, [](World& w) {
    const std::vector<int64_t> pair = w.rank() < 2 ? std::vector<int64_t>{0, 1} : std::vector<int64_t>{2, 3};
    const auto sequence = w.subgroup(pair, "sequence");
    const auto alone = w.subgroup({w.rank()}, "alone");
    EXPECT_EQ(sequence->rank(), w.rank() % 2);
    float x = static_cast<float>(w.rank()), y = x;
    Work a = sequence->all_reduce_sum(&x, 1);
    Work b = w.all().all_reduce_sum(&y, 1);
    b.wait();
    a.wait();
    EXPECT_EQ(x, w.rank() < 2 ? 1.0f : 5.0f);
    EXPECT_EQ(y, 6.0f);
    EXPECT_EQ(alone->sum(w.rank()), w.rank());
  });
}

TEST(CommGroupsTest, RanksMeetThroughATcpStore) {
  std::vector<std::thread> threads;
  std::atomic<int> agreed{0};
  for (int64_t r = 0; r < 2; ++r)
    threads.emplace_back([&, r] {
      Rendezvous at;
      at.rank = r;
      at.size = 2;
      at.port = 20000 + static_cast<int>(std::chrono::steady_clock::now().time_since_epoch().count() / 1'000'000'000 % 10000);
      at.timeout = milliseconds(20000);
      World w = World::join(at);
      if (w.all().sum(r + 1) == 3) ++agreed;
      w.all().barrier();
    });
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(agreed, 2);
}

TEST(CommFailureTest, ALeavingRankIsNamedByTheOthersAtOnce) {
  std::vector<World> worlds = World::threads(3, milliseconds(60000));
  std::vector<std::string> said(3);
  std::vector<std::thread> threads;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t r = 0; r < 3; ++r)
    threads.emplace_back([&, r] {
      World w = std::move(worlds[static_cast<size_t>(r)]);
      w.all().barrier();
      if (r == 1) return;  // its connections close here
      try {
        std::vector<float> x(100'000, 1.0f);
        for (int i = 0; i < 10; ++i) w.all().all_reduce_sum(x.data(), 100'000).wait();
      } catch (const DeviceError& e) {
        said[static_cast<size_t>(r)] = e.what();
      }
    });
  for (std::thread& t : threads) t.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(30000));
  for (int64_t r : {0, 2})
    EXPECT_TRUE(said[static_cast<size_t>(r)].starts_with(fmt::format("rank {}: all_reduce in group 'world' of 3 ranks failed at rank ", r)))
        << said[static_cast<size_t>(r)];
}

TEST(CommFailureTest, ASilentRankIsNamedAfterTheTimeout) {
  std::vector<World> worlds = World::threads(2, milliseconds(500));
  try {
    worlds[0].all().barrier();
    ADD_FAILURE() << "the barrier passed";
  } catch (const DeviceError& e) {
    EXPECT_NE(std::string(e.what()).find("rank 0: barrier in group 'world' of 2 ranks failed at rank 1: "), std::string::npos) << e.what();
  }
}

// Two ranks that do nothing but live. One leaves: the other misses it, and did not before.
TEST(HeartbeatTest, WhoGivesNoSignOfLifeIsNamedAndWhoMerelyWaitsIsNot) {
  const std::shared_ptr<Store> store = make_thread_store();
  const auto beats = [](int64_t rank) { return Beats{.rank = rank, .size = 2, .prefix = "", .who = fmt::format("pid 1{} on here", rank), .place = "", .served_by_first = true, .silence = std::chrono::seconds(3)}; };
  std::mutex mutex;
  std::string said;
  const auto lost = [&](const std::string& words) {
    const std::lock_guard lock(mutex);
    said = words;
  };
  const auto heard = [&] {
    const std::lock_guard lock(mutex);
    return said;
  };
  const Heartbeat first(beats(0), [&] { return store; }, lost);
  auto second = std::make_unique<Heartbeat>(beats(1), [&] { return store; }, lost);
  std::this_thread::sleep_for(milliseconds(9000));
  EXPECT_EQ(heard(), "");
  second.reset();
  for (int i = 0; i < 300 && heard().empty(); ++i) std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(heard(), "rank 1 (pid 11 on here): no sign of life for 3 s: stopped or hung, or its machine or the link to it is down");
}

}  // namespace
}  // namespace uly::comm
