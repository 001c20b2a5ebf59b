#include "train/rehearse.h"

#include <c10/core/InferenceMode.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "base/check.h"
#include "base/json.h"
#include "base/log.h"
#include "base/units.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "memory/gauges.h"
#include "train/session.h"

namespace uly::train {
namespace {

using Clock = std::chrono::steady_clock;

// Beside its arenas a process has program, libraries and what they allocate. With a GPU the plan leaves it so much; on the CPU it prices
// it, but for the files of the libraries, which ranks share and each counts.
constexpr int64_t kProcessBytes = int64_t{4} << 30, kFileBytes = int64_t{96} << 20;
// Predicted and measured bytes agree within one part in fifty, or a page for each buffer; on a GPU, where libraries are a guess, this.
constexpr int64_t kAgreeParts = 50, kPageBytes = 4096, kGpuSlackBytes = int64_t{128} << 20, kHugePageBytes = int64_t{2} << 20;
// Predicted and measured seconds agree within this factor, or this difference.
constexpr double kAgreeFactor = 1.25, kAgreeSeconds = 0.05;

// Streams beside compute: how the plan counts them, what the engine calls them, and people.
struct Aside {
  plan::Stream stream;
  const char *name, *words;
};
constexpr std::array kAsides = {
    Aside{plan::Stream::kToHost, "to_host", "to the host"},       Aside{plan::Stream::kToDevice, "to_device", "to the device"},
    Aside{plan::Stream::kDisk, "disk", "from and to the disk"},   Aside{plan::Stream::kHost, "host_update", "updates on the host"},
    Aside{plan::Stream::kNetwork, "exchange", "between ranks"},
};

// The micro-batches that run: a step's, and where updates are made under the next step's forward, that step's only one.
std::vector<step::Phase> phases(int64_t micro_batches, bool deferred) {
  std::vector<step::Phase> all;
  for (int64_t i = 0; i < micro_batches; ++i) all.push_back({.first = i == 0, .last = i + 1 == micro_batches});
  if (deferred) all.push_back({.update = true});
  return all;
}

// What each stream has to do in all that runs, at these rates.
std::array<double, plan::kNumStreams> busy(const Session& s, const plan::Rates& rates) {
  const step::Options o = plan::options_for(s.plan(), s.mesh().rank, s.plan().planned_length);
  std::array<double, plan::kNumStreams> sums{};
  const auto read = [&](int64_t tokens, int64_t table_bytes, const auto& program) {
    plan::Priced priced({o.mesh.P, o.mesh.W}, tokens, table_bytes, rates);
    program(priced, step::make_states(priced, s.model().units, o));
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += priced.so_far().busy[i];
  };
  for (const step::Phase& phase : phases(s.recipe().gradient_accumulation_steps, o.defers_updates()))
    read(o.s, ops::document_table_bytes(o.attention, o.S()), [&](ops::Ops& ops, const step::States& states) {
      step::micro_step(ops, s.model(), o, states, phase);
      if (phase.last) step::finish_gradients(ops, o, states);
      if (phase.last && !o.defers_updates()) step::update(ops, s.model(), o, states);
    });
  return sums;
}

// Samples of the longest length with any ids, all of them trained.
data::Batch make_batch(const Session& s) {
  const int64_t S = s.plan().planned_length, P = s.mesh().P, n = S / P, begin = s.mesh().p() * n, length = s.plan().max_length, tokens = s.recipe().micro_batch_size * length;
  data::Batch batch;
  batch.S = S, batch.num_tokens = tokens, batch.longest_document = length;
  for (int64_t i = begin; i < begin + n; ++i) {
    batch.ids.push_back(i < tokens ? i * 7919 % s.spec().V : 0);
    batch.labels.push_back(i < tokens && (i + 1) % length != 0 ? (i + 1) * 7919 % s.spec().V : data::kNoLabel);
    batch.positions.push_back(i < tokens ? i % length : i - tokens);
  }
  for (int64_t at = 0; at <= tokens; at += length) batch.document_starts.push_back(at);
  if (tokens < S) batch.document_starts.push_back(S);
  return batch;
}

// Runs the step. Loss and norm are nothing that anybody asks for here, and what they are must not keep an update from being made.
void run(Session& s) {
  const recipe::Recipe& r = s.recipe();
  const double scale = 1.0 / static_cast<double>(r.gradient_accumulation_steps * s.mesh().R() * r.micro_batch_size * s.plan().max_length), one = 1.0;
  int64_t step = 0;
  for (const step::Phase& phase : phases(r.gradient_accumulation_steps, s.plan().options.defers_updates())) {
    if (phase.first) s.begin();
    s.micro_step(make_batch(s), scale, phase.last);
    if (!phase.last) continue;
    s.finish_gradients();
    const step::States& t = s.states();
    for (const ops::Buffer& b : {t.loss_total, t.norm_total, t.applied_loss, t.applied_norm, t.host_loss, t.host_norm})
      if (b.exists()) s.engine().write(b, &one);
    s.update(r.optimizer.learning_rate, ++step);
  }
  s.engine().finish();
}

int64_t local_rank() {
  const auto place = launch::place_in_job();
  return place ? place->local_rank : 0;
}

std::optional<launch::Gpu> my_gpu() {
  const launch::Gpus gpus = launch::ask_gpus();
  if (gpus.list.empty()) return std::nullopt;
  return gpus.list[static_cast<size_t>(local_rank()) % gpus.list.size()];
}

// What the driver says that this process has of its GPU. Of a process that it does not know by this number (another namespace),
// what is free no more, shared by the ranks there. -1 where there is no driver to ask.
int64_t gpu_bytes(const std::optional<launch::Gpu>& before, int64_t ranks) {
  const std::optional<launch::Gpu> now = my_gpu();
  if (!now || !before || now->total_bytes == 0) return -1;
  for (const launch::Gpu::Process& p : now->processes)
    if (p.pid == getpid() && p.bytes > 0) return p.bytes;
  return (before->free_bytes - now->free_bytes) / std::max<int64_t>(1, ranks);
}

Json bytes_row(int64_t predicted, int64_t measured, int64_t slack) {
  const bool known = measured >= 0;
  return {{"predicted_bytes", predicted}, {"measured_bytes", known ? Json(measured) : Json()}, {"agree", known ? Json(std::abs(measured - predicted) <= std::max(predicted / kAgreeParts, slack)) : Json()}};
}

// What one rank has found.
Json figures(Session& s, double seconds, int64_t before, const std::optional<launch::Gpu>& gpu_before) {
  const bool cuda = s.machine().cuda;
  const plan::Price price = plan::price_step(s.model(), plan::options_for(s.plan(), s.mesh().rank, s.plan().planned_length));
  const auto held = s.engine().held_bytes();
  const int64_t pages = kPageBytes * static_cast<int64_t>(price.run_places.bytes.size() + price.step_places.bytes.size());
  Json out = {{"rank", s.mesh().rank}, {"seconds", seconds}};
  out["device"] = bytes_row(price.total_bytes() + (cuda ? s.plan().besides_bytes : 0), cuda ? gpu_bytes(gpu_before, s.machine().gpu_ranks) : held[0], cuda ? kGpuSlackBytes : pages);
  out["host"] = bytes_row(price.total_bytes(ops::Tier::kHost), held[1], cuda ? 2 * kHugePageBytes : pages);
  out["disk"] = bytes_row(price.total_bytes(ops::Tier::kDisk), held[2], pages);
  const int64_t peak = memory::peak_resident_bytes(), arenas = held[1] + (cuda ? 0 : held[0]), most = cuda ? kProcessBytes : s.plan().besides_bytes + kFileBytes;
  out["process"] = {{"peak_bytes", peak}, {"at_start_bytes", before}, {"arenas_bytes", arenas}, {"besides_bytes", peak - before - arenas}, {"planned_bytes", most}, {"group_peak_bytes", memory::group_peak_bytes()}, {"agree", peak - arenas >= 0 && peak - arenas <= most}};

  const auto bytes = busy(s, {.to_host_bytes = 1, .to_device_bytes = 1, .disk_bytes = 1, .host_update_bytes = 1, .sequence_bytes = 1, .node_bytes = 1, .gather_bytes = 1, .scatter_bytes = 1}), predicted = busy(s, s.plan().rates);
  const auto measured = s.engine().seconds();
  for (const Aside& aside : kAsides) {
    const size_t i = static_cast<size_t>(aside.stream);
    if (bytes[i] == 0) continue;
    const auto found = measured.find(aside.name);
    const double took = found == measured.end() ? 0 : found->second, wanted = predicted[i];
    const bool both = wanted > 0 && took > 0;
    out["copies"][aside.name] = {{"bytes", static_cast<int64_t>(bytes[i])}, {"predicted_seconds", wanted > 0 ? Json(wanted) : Json()}, {"measured_seconds", took > 0 ? Json(took) : Json()},
                                 {"agree", both ? Json(std::abs(took - wanted) <= kAgreeSeconds || (took <= wanted * kAgreeFactor && wanted <= took * kAgreeFactor)) : Json()}};
  }
  return out;
}

// Of all ranks' rows the one to tell: one that disagrees, else the largest.
Json row_to_tell(const Json& ranks, const Json::json_pointer& row, const char* by) {
  Json told;
  const auto weight = [&](const Json& r) { return std::pair(r.at("agree") == false, r.at(by).is_null() ? 0.0 : r.at(by).get<double>()); };
  for (const Json& rank : ranks)
    if (rank.contains(row) && (told.is_null() || weight(rank.at(row)) > weight(told))) told = rank.at(row);
  return told;
}

std::string verdict(const Json& agree) { return agree.is_null() ? "" : agree.get<bool>() ? ": agree" : ": do not agree"; }

std::string bytes_words(const Json& row, const char* how) {
  const int64_t predicted = row.at("predicted_bytes");
  if (row.at("measured_bytes").is_null()) return fmt::format("{} predicted; nothing tells what it is", format_bytes(predicted));
  const int64_t measured = row.at("measured_bytes");
  if (predicted == 0 && measured == 0) return "none, as predicted";
  const std::string difference = predicted > 0 ? fmt::format(" ({:+.1f} %)", 100.0 * static_cast<double>(measured - predicted) / static_cast<double>(predicted)) : "";
  return fmt::format("{} predicted, {} {}{}{}", format_bytes(predicted), format_bytes(measured), how, difference, verdict(row.at("agree")));
}

std::string copies_words(const char* words, const Json& row) {
  const double bytes = row.at("bytes").get<double>();
  std::string text = fmt::format("{}: {}", words, format_bytes(row.at("bytes")));
  if (!row.at("predicted_seconds").is_null()) text += fmt::format(", {:.2f} s predicted", row.at("predicted_seconds").get<double>());
  if (row.at("measured_seconds").is_null()) return text + ", not measured";
  const double seconds = row.at("measured_seconds");
  return text + fmt::format(", {:.2f} s measured ({:.1f} GB/s){}", seconds, bytes / seconds / 1e9, verdict(row.at("agree")));
}

std::string text_of(const Json& all, bool cuda) {
  std::string text;
  const auto line = [&](std::string_view subject, const std::string& words) { text += fmt::format("{:<10} {}\n", subject, words); };
  const auto row = [&](const char* name, const char* by) { return row_to_tell(all.at("ranks"), Json::json_pointer(name), by); };
  const int64_t world = all.at("world"), micro_batches = all.at("micro_batches");
  line("ran", fmt::format("{} micro-batch{} of {} tokens on {} rank{}, updates {}: {:.1f} s; without the arithmetic of linear maps and attention", micro_batches, micro_batches == 1 ? "" : "es", format_count(all.at("planned_length")), world,
                          world == 1 ? "" : "s", all.at("deferred").get<bool>() ? "under the forward of one more" : "at their end", all.at("seconds").get<double>()));
  line("device", bytes_words(row("/device", "measured_bytes"), cuda ? "held, says the driver" : "touched"));
  line("host", bytes_words(row("/host", "measured_bytes"), cuda ? "taken" : "touched"));
  line("disk", bytes_words(row("/disk", "measured_bytes"), "in scratch files"));
  const Json process = row("/process", "peak_bytes");
  line("process", fmt::format("{} at most, {} of it arenas, {} program and libraries at their start, {} besides{}", format_bytes(process.at("peak_bytes")), format_bytes(process.at("arenas_bytes")), format_bytes(process.at("at_start_bytes")),
                              format_bytes(std::max<int64_t>(0, process.at("besides_bytes"))), process.at("agree").get<bool>() ? "" : fmt::format(": more than the {} that the plan leaves them", format_bytes(process.at("planned_bytes").get<int64_t>()))));
  if (world > 1) line("", fmt::format("{} at most by all ranks together", format_bytes(all.at("host_peak_bytes"))));
  if (const int64_t group = process.at("group_peak_bytes"); group >= 0) line("", fmt::format("{} at most by this control group so far, file cache included", format_bytes(group)));
  bool first = true;
  for (const Aside& aside : kAsides)
    if (const Json copies = row(fmt::format("/copies/{}", aside.name).c_str(), "measured_seconds"); !copies.is_null()) line(first ? "copies" : "", copies_words(aside.words, copies)), first = false;
  line("plan", all.at("agree").get<bool>() ? "the bytes agree with it" : "the bytes do not agree with it");
  return text;
}

}  // namespace

std::string rehearse(const Job& job, comm::World& world) {
  const c10::InferenceMode no_autograd;
  const int64_t before = memory::resident_bytes();
  const std::optional<launch::Gpu> gpu_before = job.cuda ? my_gpu() : std::nullopt;
  Session session(job, world);
  session.engine().finish();
  session.engine().time(true);
  world.all().barrier();
  if (session.first() && !job.json) say("memory is taken, the step of {} tokens begins", format_count(session.plan().planned_length));
  const Clock::time_point begin = Clock::now();
  run(session);
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  const std::vector<std::string> all = world.all().exchange(figures(session, seconds, before, gpu_before).dump());
  if (!session.first()) return "";

  const plan::Plan& plan = session.plan();
  Json out = {{"hash", plan.hash}, {"device", job.cuda ? "cuda" : "cpu"}, {"world", world.size()}, {"planned_length", plan.planned_length}, {"micro_batches", session.recipe().gradient_accumulation_steps}, {"deferred", plan.options.defers_updates()}, {"agree", true}, {"seconds", 0.0}, {"host_peak_bytes", int64_t{0}}};
  for (const std::string& one : all) {
    const Json rank = Json::parse(one);
    for (const char* row : {"device", "host", "disk", "process"})
      if (rank.at(row).at("agree") == false) out["agree"] = false;
    out["seconds"] = std::max(out["seconds"].get<double>(), rank.at("seconds").get<double>());
    out["host_peak_bytes"] = out["host_peak_bytes"].get<int64_t>() + rank.at("process").at("peak_bytes").get<int64_t>();
    out["ranks"].push_back(rank);
  }
  return job.json ? out.dump(2) + "\n" : text_of(out, job.cuda);
}

int rehearse(const Job& job) {
  comm::World world = comm::World::join(comm::rendezvous_from_environment());
  const std::string text = rehearse(job, world);
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
  world.all().barrier();
  return static_cast<int>(Exit::kDone);
}

}  // namespace uly::train
