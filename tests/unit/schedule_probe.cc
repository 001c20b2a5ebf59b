// Prints the learning rate of every update: schedule_probe NAME ARGUMENTS_JSON WARMUP_RATIO BASE HORIZON STEPS
#include <cstdio>
#include <string>

#include "base/check.h"
#include "recipe/recipe.h"

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  try {
    uly::recipe::Scheduler scheduler;
    scheduler.name = argv[1];
    scheduler.specific = uly::Json::parse(argv[2]);
    scheduler.warmup_ratio = std::stod(argv[3]);
    for (int64_t step = 0; step < std::stoll(argv[6]); ++step) {
      std::printf("%.17g\n", uly::recipe::learning_rate(scheduler, std::stod(argv[4]), step, std::stoll(argv[5])));
    }
  } catch (const uly::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return static_cast<int>(error.exit());
  }
  return 0;
}
