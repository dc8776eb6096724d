// Denoises a PPM with a package that `fastden export color -o color.pt2 --format aoti` wrote. docs/use-from.md says how to build.
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <string>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <vector>

constexpr int64_t LONGEST = 1 << 20; // of a side: the number of bytes fits 64 bits

int main(int count, char **words) try {
  if (count != 5) {
    std::cerr << "usage: denoise color.pt2 noisy.ppm clean.ppm SIGMA (0-75)\n";
    return 2;
  }
  char *end = nullptr;
  const double level = std::strtod(words[4], &end);
  if (end == words[4] || *end != '\0' || !(level >= 0 && level <= 75)) {
    std::cerr << "SIGMA: " << words[4] << "; accepted: a number from 0 to 75\n";
    return 2;
  }
  std::ifstream file(words[2], std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, largest = 0;
  file >> kind >> width >> height >> largest;
  file.get();
  if (!file || kind != "P6" || largest != 255) {
    std::cerr << words[2] << ": not a binary PPM of 8 bits without comments\n";
    return 1;
  }
  if (width < 1 || height < 1 || width > LONGEST || height > LONGEST) {
    std::cerr << words[2] << ": " << width << " x " << height << " pixels; accepted: sides of 1 to " << LONGEST << "\n";
    return 1;
  }
  std::vector<uint8_t> pixels(width * height * 3);
  if (!file.read(reinterpret_cast<char *>(pixels.data()), pixels.size())) {
    std::cerr << words[2] << ": ends too early\n";
    return 1;
  }
  const c10::InferenceMode inference;
  const auto bytes = torch::from_blob(pixels.data(), {height, width, 3}, torch::kUInt8);
  const auto image = bytes.permute({2, 0, 1}).unsqueeze(0).to(torch::kFloat32).div(255).contiguous();
  const auto sigma = torch::full({1, 1, height, width}, level / 255, torch::kFloat32);

  torch::inductor::AOTIModelPackageLoader network(words[1]);
  const auto result = network.run({image, sigma}).at(0);

  const auto clean = result[0].mul(255).round().clamp(0, 255).to(torch::kUInt8).permute({1, 2, 0}).contiguous();
  std::ofstream output(words[3], std::ios::binary);
  output << "P6\n" << width << " " << height << "\n255\n";
  output.write(reinterpret_cast<const char *>(clean.const_data_ptr<uint8_t>()), clean.numel());
  return output.flush() ? 0 : 1;
} catch (const std::exception &error) {
  const std::string why = error.what();
  std::cerr << words[1] << ": cannot be run: " << why.substr(0, why.find('\n')) << "\n"; // behind it is PyTorch's trace
  return 1;
}
