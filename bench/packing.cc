// How fast documents are packed and how full the packs are, what a plan with them takes, and what a rank takes to load a pack:
// build/bench_packing [--documents N] [--max-length N]
//
// Lengths are lognormal about a median of 700 tokens, as chats are; a row for each strategy is printed and, with --json FILE, appended.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <vector>

#include "base/json.h"
#include "base/safetensors.h"
#include "base/units.h"
#include "data/batch.h"
#include "data/random.h"
#include "plan/plan.h"

namespace {

using namespace uly;

// A token file whose starts are real; its tokens are a hole in the file, which nobody reads.
std::string write_starts(const std::vector<int64_t>& starts) {
  const int64_t T = starts.back(), n = static_cast<int64_t>(starts.size());
  Json header = {{"__metadata__", {{"format", "ulysses-tokens-1"}, {"vocabulary", "32000"}}},
                 {"ids", {{"dtype", "I32"}, {"shape", {T}}, {"data_offsets", {n * 8, n * 8 + T * 4}}}},
                 {"trained", {{"dtype", "U8"}, {"shape", {T}}, {"data_offsets", {n * 8 + T * 4, n * 8 + T * 5}}}},
                 {"starts", {{"dtype", "I64"}, {"shape", {n}}, {"data_offsets", {0, n * 8}}}}};
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::string path = std::filesystem::temp_directory_path() / "bench_packing.safetensors";
  std::ofstream file(path, std::ios::binary);
  const uint64_t size = text.size();
  file.write(reinterpret_cast<const char*>(&size), 8);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  file.write(reinterpret_cast<const char*>(starts.data()), n * 8);
  file.close();
  std::filesystem::resize_file(path, 8 + text.size() + static_cast<uint64_t>(n * 8 + T * 5));
  return path;
}

double uniform(uint64_t seed, uint64_t i) { return (static_cast<double>(data::hash(seed, i) >> 11) + 0.5) * 0x1p-53; }

std::string machine() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(line.find(": ") + 2);
  return "unknown";
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"How fast documents are packed, and how full the packs are"};
  int64_t documents = 1'000'000, max_length = 1'000'000;
  std::string json;
  app.add_option("--documents", documents);
  app.add_option("--max-length", max_length);
  app.add_option("--json", json, "file to append rows to");
  CLI11_PARSE(app, argc, argv);
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i < documents; ++i) {
    const double normal = std::sqrt(-2 * std::log(uniform(1, static_cast<uint64_t>(i)))) * std::cos(6.283185307179586 * uniform(2, static_cast<uint64_t>(i)));
    starts.push_back(starts.back() + std::clamp<int64_t>(static_cast<int64_t>(700 * std::exp(normal)), 16, max_length));
  }
  const std::string path = write_starts(starts);
  const data::TokenFile file(path);
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  const auto row = [&](const std::string& what, double seconds, Json more) {
    if (json.empty()) return;
    Json row = {{"run", "packing"}, {"system", "ulysses-plus"}, {"what", what}, {"seconds", seconds}, {"command", fmt::format("build/bench_packing --documents {} --max-length {}", documents, max_length)}, {"machine", machine()}, {"date", date}};
    row.update(more);
    std::ofstream(json, std::ios::app) << row.dump() << "\n";
  };
  const auto seconds_of = [](auto&& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  for (const auto& [name, strategy, exactly] : {std::tuple("in_order", recipe::PackStrategy::kInOrder, false), std::tuple("best_fit", recipe::PackStrategy::kBestFit, false), std::tuple("always_max_length", recipe::PackStrategy::kInOrder, true)}) {
    data::Packs packs;
    const double seconds = seconds_of([&] { packs = data::make_packs(file, nullptr, {.max_length = max_length, .pack = true, .strategy = strategy, .always_max_length = exactly}); });
    const double fill = static_cast<double>(packs.num_tokens) / (static_cast<double>(packs.size()) * static_cast<double>(max_length));
    fmt::print("{:<18} {} documents, {} tokens to {} packs of {}: {:.3f} s, {:.3f} % of the room used\n", name, format_count(documents), format_count(packs.num_tokens), format_count(packs.size()), format_count(max_length), seconds, 100 * fill);
    row(fmt::format("{}: {} documents to packs of {}", name, documents, max_length), seconds, {{"fill", fill}, {"packs", packs.size()}});
    if (strategy != recipe::PackStrategy::kBestFit) continue;
    for (const int64_t P : {1, 8}) {
      const int64_t S = (packs.longest + P - 1) / P * P;
      const double load = seconds_of([&] {
        data::count_labels(file, packs, {0}, S, P, P - 1);
        data::make_batch(file, packs, {0}, S, P, P - 1);
      });
      fmt::print("{:<18} a pack of {} tokens, one rank of {}: {:.4f} s\n", "load", format_count(packs.longest), P, load);
      row(fmt::format("load: a rank of {} its shard of a pack of {}", P, packs.longest), load, Json::object());
    }
  }
  recipe::Recipe recipe;
  recipe.data.max_length = max_length, recipe.data.pack_samples = true, recipe.data.pack_strategy = recipe::PackStrategy::kBestFit;
  models::Spec spec;  // Llama-3.1-8B
  spec.L = 32, spec.D = 4096, spec.F = 14336, spec.N = 32, spec.K = 8, spec.H = 128, spec.V = 128256;
  plan::Plan plan;
  const double planning = seconds_of([&] { plan = plan::make(recipe, spec, {}, 1, plan::DataFacts{.tokens_path = path}); });
  fmt::print("{:<18} with these packs: {:.3f} s, attention takes {:.4f} of one document's\n", "plan", planning, plan.document_share);
  row(fmt::format("plan with {} documents", documents), planning, {{"attention_share", plan.document_share}});
  std::filesystem::remove(path);
}
