// Output parser of nvinfer for a detector of hkd-export: converts boxes (K, 4) and scores (K) to objects of class 0.
//
// Boxes are xyxy in network input pixels, sorted by descending score, without duplicates. nvinfer maps them to the
// frame. Build: make (see the Makefile in this directory).

#include <cstring>
#include <iostream>
#include <vector>

#include "nvdsinfer_custom_impl.h"

static const NvDsInferLayerInfo *find_layer(std::vector<NvDsInferLayerInfo> const &layers, const char *name) {
    for (auto const &layer : layers) {
        if (layer.layerName && std::strcmp(layer.layerName, name) == 0) return &layer;
    }
    std::cerr << "nvdsinfer_hkd: the model has no output " << name << std::endl;
    return nullptr;
}

static bool is_float(NvDsInferLayerInfo const &layer, unsigned int num_dims) {
    if (layer.buffer && layer.dataType == FLOAT && layer.inferDims.numDims == num_dims) return true;
    std::cerr << "nvdsinfer_hkd: output " << layer.layerName << ": expected float32 with " << num_dims
              << " dimension(s) after the batch" << std::endl;
    return false;
}

extern "C" bool NvDsInferParseCustomHkd(
    std::vector<NvDsInferLayerInfo> const &outputLayersInfo, NvDsInferNetworkInfo const &networkInfo,
    NvDsInferParseDetectionParams const &detectionParams, std::vector<NvDsInferParseObjectInfo> &objectList) {
    const NvDsInferLayerInfo *boxes = find_layer(outputLayersInfo, "boxes");
    const NvDsInferLayerInfo *scores = find_layer(outputLayersInfo, "scores");
    if (!boxes || !scores || !is_float(*boxes, 2) || !is_float(*scores, 1)) return false;
    const unsigned int rows = scores->inferDims.d[0];
    if (boxes->inferDims.d[0] != rows || boxes->inferDims.d[1] != 4) {
        std::cerr << "nvdsinfer_hkd: boxes and scores have different numbers of rows" << std::endl;
        return false;
    }
    if (detectionParams.perClassPreclusterThreshold.empty()) {
        std::cerr << "nvdsinfer_hkd: num-detected-classes: expected 1, got 0" << std::endl;
        return false;
    }
    const float threshold = detectionParams.perClassPreclusterThreshold[0];
    const float width = static_cast<float>(networkInfo.width), height = static_cast<float>(networkInfo.height);
    const float *xyxy = static_cast<const float *>(boxes->buffer);
    const float *score = static_cast<const float *>(scores->buffer);
    for (unsigned int row = 0; row < rows; ++row, xyxy += 4) {
        if (!(score[row] >= threshold)) break;  // scores are descending
        const float left = xyxy[0] < 0 ? 0 : xyxy[0], top = xyxy[1] < 0 ? 0 : xyxy[1];
        const float right = xyxy[2] > width ? width : xyxy[2], bottom = xyxy[3] > height ? height : xyxy[3];
        if (!(right > left && bottom > top)) continue;  // outside the image
        NvDsInferParseObjectInfo object{};
        object.classId = 0;
        object.left = left;
        object.top = top;
        object.width = right - left;
        object.height = bottom - top;
        object.detectionConfidence = score[row];
        objectList.push_back(object);
    }
    return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseCustomHkd);
